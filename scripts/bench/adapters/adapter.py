"""What the adapters share: a library that has no server is asked over its own standard input and output, one JSON line each way.

    {"prompts": [[id, …], …], "shared": 768, "concurrency": 32, "output_tokens": 64}
    {"sent": [t, …], "times": [[t, …], …]}

The first `shared` ids of all prompts are the same. The answer has one entry a prompt: when it was handed over, and when each of its tokens
came, in seconds of the monotonic clock, which all processes of a machine have in common. An adapter runs in the library's own environment,
so nothing here imports more than the standard library.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from time import perf_counter
from typing import Any

Generate = Callable[[list[list[int]], int, int], list[list[float]]]
"""(prompts, shared, output_tokens): answer all prompts together, the end token ignored; for each, when its tokens came."""
Open = Callable[[str, int], tuple[str, Generate]]
"""(model, threads): load it; the library's version, and what answers."""


def main(open_model: Open) -> None:
    """Load the model, say so, and answer until standard input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    # Libraries print; the lines are kept for ourselves, and prints go where errors go.
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    # Before any library is imported: most read it once.
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    version, generate = open_model(arguments.model, arguments.threads)
    print(json.dumps({"version": version}), file=lines)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line), generate)), file=lines)


def answer(work: dict[str, Any], generate: Generate) -> dict[str, Any]:
    """Hand over `concurrency` prompts at a time."""
    sent: list[float] = []
    times: list[list[float]] = []
    for first in range(0, len(work["prompts"]), work["concurrency"]):
        prompts = work["prompts"][first : first + work["concurrency"]]
        sent += [perf_counter()] * len(prompts)
        times += generate(prompts, work["shared"], work["output_tokens"])
    return {"sent": sent, "times": times}
