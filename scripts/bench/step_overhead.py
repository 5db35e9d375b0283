#!/usr/bin/env python3
"""Measure what a step of one stream takes outside the model: scripts/bench/step_overhead.py [--json FILE] [-- OPTIONS OF serve]

    ├─ prepare ─┼─ model ─┼─ sample ─┤ wait for a plan ├─ prepare ─ …
    └──────────── a step ────────────┘
    └───────────────── from token to token ─────────────┘       outside = all of it but the model

One request streams alone, greedily, some times; figures are medians. Times of the model and of steps are the worker's own
(headrace_forward_seconds, headrace_step_seconds). The client is on the same cores. The aim is 3% of a step.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import NamedTuple

import msgspec
from processes import SERVE, Engine, engine, parse

from headrace.client import Client
from headrace.client.bench.machine import facts

GOAL = 0.03


class Times(NamedTuple):
    """Microseconds from token to token, and in one step or in several."""

    period: float
    step: float
    model: float

    @property
    def outside_share(self) -> float:
        return 1 - self.model / self.period


def stream(running: Engine, client: Client, prompt: str, tokens: int) -> tuple[Times, float]:
    """Of all steps of a request that the metrics know of at its end, and how many they are; the period is from token to token."""
    before = totals(running)
    options = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    at = [perf_counter() for chunk in client.complete_stream(prompt, **options) if any(choice.text for choice in chunk.choices)]
    step, model, steps = (b - a for a, b in zip(before, totals(running), strict=True))
    return Times(1e6 * (at[-1] - at[0]) / max(1, tokens - 1), 1e6 * step, 1e6 * model), steps


def totals(running: Engine) -> list[float]:
    """Seconds in steps and in the model so far, and steps, all at one moment."""
    series = running.metrics()
    return [series[name] for name in ("headrace_step_seconds_sum", "headrace_forward_seconds_sum", "headrace_forward_seconds_count")]


def measure(running: Engine, client: Client, round_: int, tokens: int) -> Times:
    """A step that decodes: those of a request less that of another's prompt."""
    prompt, _ = stream(running, client, f"{2 * round_} Name all rivers of the world:", 1)
    times, steps = stream(running, client, f"{2 * round_ + 1} Name all rivers of the world:", tokens)
    return Times(times.period, (times.step - prompt.step) / (steps - 1), (times.model - prompt.model) / (steps - 1))


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
    middle = Times(*(median(column) for column in zip(*rounds, strict=True)))
    share = median(one.outside_share for one in rounds)
    result = {
        "schema": "headrace-step-overhead/1",
        "options": arguments.serve,
        "us": middle._asdict(),
        "outside_share": share,
        "outside_share_by_round": [one.outside_share for one in rounds],
        "machine": msgspec.to_builtins(facts()),
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"µs from token to token {middle.period:.0f}, in a step {middle.step:.0f}, in the model {middle.model:.0f}")
    print(f"{'met   ' if share <= GOAL else 'MISSED'}  {share:.1%} of it outside the model (goal {GOAL:.0%}); saved {arguments.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
