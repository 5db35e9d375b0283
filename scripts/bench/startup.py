#!/usr/bin/env python3
"""Time `headrace serve` from its start to ready, and what it costs while nothing happens.

    scripts/bench/startup.py [--rounds N] [--idle SECONDS] [--json FILE] [-- OPTIONS OF headrace serve]

Ready is when `GET /health/ready` answers 200. Idle CPU is that of all processes together, from the kernel's own account of them.
"""

import argparse
import asyncio
import json
import socket
import sys
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import Any

import msgspec
from processes import SERVE, engine, parse, shares

from headrace.client.bench.machine import facts
from headrace.client.bench.wire import ask
from headrace.client.calls import Server

SETTLE_S = 2.0
"""Between readiness and the idle measurement: what start-up left behind is not idling."""
GOAL_READY_S = 3.0
GOAL_IDLE = 0.01


def one_round(words: list[str], idle_s: float) -> dict[str, Any]:
    """Start, wait until ready, idle, stop."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began = perf_counter()
    with engine(SERVE, "--port", str(port), *words) as running:
        running.wait_until_ready()
        said = perf_counter() - began
        status, _ = asyncio.run(ask(Server.parse(running.address, None), "GET", "/health/ready"))
        ready = perf_counter() - began
        if status != 200:
            raise SystemExit(f"the engine said that it was ready, but /health/ready answered {status}")
        result: dict[str, Any] = {"ready_s": ready, "said_ready_s": said}
        if idle_s:
            sleep(SETTLE_S)
            before, start = running.usage(), perf_counter()
            sleep(idle_s)
            after = running.usage()
            result["idle_shares"] = shares(before, after, perf_counter() - start)
            result["idle_share"] = sum(result["idle_shares"].values())
            result["rss_mib"] = {name: round(usage.rss_mib, 1) for name, usage in after.items()}
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description="Time the start of `headrace serve` and its idle CPU.")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--idle", type=float, default=10.0, metavar="SECONDS", help="measured in the last round (default: 10; 0: not)")
    parser.add_argument("--json", type=Path, default=Path("build/bench/startup.json"), help="default: %(default)s")
    arguments = parse(parser)
    rounds = []
    for number in range(arguments.rounds):
        rounds.append(one_round(arguments.serve, arguments.idle if number == arguments.rounds - 1 else 0.0))
        print(f"round {number + 1}: ready after {rounds[-1]['ready_s']:.2f} s", flush=True)
    ready = median(entry["ready_s"] for entry in rounds)
    result = {
        "schema": "headrace-startup/1",
        "options": arguments.serve,
        "ready_s": ready,
        "goal_ready_s": GOAL_READY_S,
        "idle_share": rounds[-1].get("idle_share"),
        "goal_idle_share": GOAL_IDLE,
        "rounds": rounds,
        "machine": msgspec.to_builtins(facts()),
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"ready after {ready:.2f} s (median of {len(rounds)}; goal {GOAL_READY_S} s)")
    if result["idle_share"] is not None:
        print(f"idle: {result['idle_share']:.2%} of a core, all processes (goal {GOAL_IDLE:.0%}): {rounds[-1]['idle_shares']}")
    print(f"saved {arguments.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
