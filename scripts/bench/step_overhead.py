#!/usr/bin/env python3
"""Measure what a step of one stream takes outside the model: scripts/bench/step_overhead.py [--json FILE] [-- OPTIONS OF serve]

    period of a step   ─ the model's part of it (headrace_forward_seconds)   =   what plans, results, ledgers and messages add
    between tokens       measured by the worker

One request streams alone, greedily, some times; figures are medians. The client is on the same cores. The aim is 3% of a step.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from time import perf_counter

import msgspec
from processes import Engine, engine, parse

from headrace.client import Client
from headrace.client.bench.machine import facts

SERVE = "import sys; from headrace.engine.cli import main; sys.exit(main(['serve', *sys.argv[1:]]))"
GOAL = 0.03


def stream(running: Engine, client: Client, prompt: str, tokens: int) -> tuple[list[float], float, float]:
    """When tokens came, in seconds; the model's time, in seconds, and steps."""
    before = forward(running)
    options = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    at = [perf_counter() for chunk in client.complete_stream(prompt, **options) if any(choice.text for choice in chunk.choices)]
    after = forward(running)
    return at, after[0] - before[0], after[1] - before[1]


def measure(running: Engine, client: Client, round_: int, tokens: int) -> tuple[float, float]:
    """Microseconds of a step, and of the model in it."""
    _, prefill, _ = stream(running, client, f"{2 * round_} Name all rivers of the world:", 1)
    at, model, steps = stream(running, client, f"{2 * round_ + 1} Name all rivers of the world:", tokens)
    return 1e6 * (at[-1] - at[0]) / (steps - 1), 1e6 * (model - prefill) / (steps - 1)


def forward(running: Engine) -> tuple[float, float]:
    """Seconds in the model so far, and steps."""
    return running.metric("headrace_forward_seconds_sum"), running.metric("headrace_forward_seconds_count")


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure what a step of one stream takes outside the model.")
    parser.add_argument("--tokens", type=int, default=500, help="of each stream (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--json", type=Path, default=Path("build/bench/step_overhead.json"), help="default: %(default)s")
    arguments = parse(parser)
    with engine(SERVE, "--port", "0", *arguments.serve) as running:
        running.wait_until_ready()
        with Client(running.address) as client:
            measure(running, client, 0, 50)
            rounds = [measure(running, client, 1 + round_, arguments.tokens) for round_ in range(arguments.rounds)]
    shares = [1 - model / period for period, model in rounds]
    result = {
        "schema": "headrace-step-overhead/1",
        "options": arguments.serve,
        "step_us": median(period for period, _ in rounds),
        "model_us": median(model for _, model in rounds),
        "outside_us": median(period - model for period, model in rounds),
        "outside_share": median(shares),
        "outside_share_by_round": shares,
        "machine": msgspec.to_builtins(facts()),
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"a step {result['step_us']:.0f} µs, the model {result['model_us']:.0f}, outside it {result['outside_us']:.0f}")
    met = result["outside_share"] <= GOAL
    print(f"{'met   ' if met else 'MISSED'}  {result['outside_share']:.1%} of a step (goal {GOAL:.0%}); saved {arguments.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
