#!/usr/bin/env python3
"""Time Triton kernels on the CPU's own backend beside Triton's interpreter: the same launches, each in a process of its own.

    scripts/bench/triton_cpu.py [--json FILE]

The interpreter runs in float32, the one type that it rounds rightly, and so does the backend. Compiling is not counted.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


def launches() -> dict[str, Callable[[], object]]:
    """Name and call of each."""
    import torch

    from headrace.kernels.ops import HeadShape
    from headrace.kernels.triton import TritonOps
    from headrace.kernels.triton.pages import KVPages
    from headrace.kernels.triton.step import StepTokens, Tiles
    from headrace.kernels.triton.weights import DeviceWeight

    ops, heads, device = TritonOps(torch.float32, torch.float32), HeadShape(8, 2, 64), torch.device("cpu")
    weight = [DeviceWeight("floats", torch.randn(512, 512), 512)]
    kv = KVPages.new(64, 16, heads, device, "f32")
    kv.keys.normal_()
    kv.values.normal_()

    def tokens(count: int, context: int) -> StepTokens:
        positions = torch.arange(context - count, context, dtype=torch.int32)
        rows = torch.tensor([[0, first, min(first + 16, count)] for first in range(0, count, 16)], dtype=torch.int32)
        pages = torch.arange(64, dtype=torch.int32).view(1, 64)
        start = torch.tensor([0, count], dtype=torch.int32)
        return StepTokens(positions, positions, positions, start, pages, -(-context // 256), (0, count), known_tiles={4: Tiles(rows)})

    decode, prefill = tokens(1, 512), tokens(64, 512)
    one, many, x, ones = torch.randn(1, 512), torch.randn(64, 512), torch.randn(64, 512), torch.ones(512)
    return {
        "linear 512×512, 64 rows": lambda: ops.linear(x, weight),
        "attention, 1 row of 512": lambda: ops.attention(one, heads, kv, decode, 0.125, None),
        "attention, 64 rows of 512": lambda: ops.attention(many, heads, kv, prefill, 0.125, None),
        "rmsnorm 512, 64 rows": lambda: ops.rmsnorm(x, ones, 1e-5),
    }


def times() -> dict[str, float]:
    """Seconds of each, the best of some."""
    found = {}
    for name, launch in launches().items():
        launch()
        best, begun = float("inf"), time.perf_counter()
        for _ in range(20):
            before = time.perf_counter()
            launch()
            best = min(best, time.perf_counter() - before)
            if time.perf_counter() - begun > 5:
                break
        found[name] = best
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Time Triton kernels on the CPU's own backend beside Triton's interpreter.")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--times", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.times:
        print(json.dumps(times()))
        return
    ways = {}
    for way, environment in (("backend", {"OMP_WAIT_POLICY": "PASSIVE"}), ("interpreter", {"TRITON_INTERPRET": "1"})):
        command = [sys.executable, "-W", "ignore", __file__, "--times"]
        ended = subprocess.run(command, env=os.environ | environment, check=True, stdout=subprocess.PIPE, text=True)
        ways[way] = json.loads(ended.stdout)
    print(f"{'':28} {'backend ms':>11} {'interpreter ms':>15} {'times faster':>13}")
    for name, took in ways["backend"].items():
        other = ways["interpreter"][name]
        print(f"{name:28} {took * 1e3:11.2f} {other * 1e3:15.1f} {other / took:13.0f}")
    if arguments.json:
        written = {"cores": len(os.sched_getaffinity(0))} | ways
        arguments.json.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
