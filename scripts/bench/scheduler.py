#!/usr/bin/env python3
"""Time the scheduler alone: the real actor, without sockets, beside a worker that computes nothing.

    scripts/bench/scheduler.py [--json FILE] [--steps N]

A step's cost is the CPU time from the bytes of its result to the bytes of the next plan and of the tokens that are handed out: decoding,
the mirror ledger, the journal, planning, encoding. It is measured while requests decode, by how many they are, with nothing waiting
and with a long queue that has no place to run (plans are sent ahead in both cases), with an empty prefix cache and with
one of a million tokens. The worker's own work is not counted.
"""

import argparse
import json
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import msgspec

from headrace.client.bench.machine import facts
from headrace.engine.checkpoint.card import ModelFiles
from headrace.engine.config import Config
from headrace.engine.messages.sampling import Sampling
from headrace.engine.messages.steps import FromWorker, ToWorker
from headrace.engine.messages.tokens import Submit
from headrace.engine.messages.wire import Codec, Message, encode
from headrace.engine.metrics import Metrics
from headrace.engine.process import collect_seldom
from headrace.engine.scheduler.scheduler import Scheduler
from headrace.workers.fake import FakeRunner
from headrace.workers.worker import Worker

RUNNING = (1, 64, 256, 1024)
WAITING = 10_000
CACHED = 1_000_000
"""Tokens in the prefix cache, of prompts of CACHED_PROMPT."""
CACHED_PROMPT = 4_000
ROUNDS = 5
PAGE_SIZE = 16
PAGES = 160_000
STEP_TOKENS = 2_048
PROMPT = 32
MOST_TOKENS = 100_000
GOAL_US = 300.0
"""CPU time of a step with 256 running requests."""
MODEL = ModelFiles("fake", "/nowhere", "gguf", "llama", context=1 << 20, vocab_size=32_000, end_tokens=(2,), bos_token=1, weight_bytes=0)


class Desk:
    """What a `Process` is to its actor. Messages are encoded as for a socket, and those to its peer kept."""

    incarnation = 1
    model = MODEL

    def __init__(self, name: str, config: Config, peer: str) -> None:
        self.name = name
        self.config = config
        self.metrics = Metrics()
        self.rejected_frames = self.metrics.counter("headrace_rejected_frames_total", "Of no use here.")
        self.post = self
        self.progress: Any = None
        self.kept: deque[bytes] = deque()
        """What was sent to `peer` and is unread."""
        self._peer = peer

    def send(self, to: str, message: Message) -> bool:
        frame = encode(message)
        if to == self._peer:
            self.kept.append(frame)
        return True

    def forget(self, to: str) -> None:
        """Nobody dies here."""

    def later(self, seconds: float, act: Callable[[], None]) -> None:
        """Nothing here has a deadline."""


class Rig:
    """A scheduler and a worker that take turns."""

    def __init__(self, running: int) -> None:
        config = Config(max_running=running, max_step_tokens=STEP_TOKENS, max_waiting=1 << 20, max_waiting_tokens=1 << 30, step_target=1e6)
        desk, worker_desk = Desk("scheduler", config, "worker-0"), Desk("worker-0", config, "scheduler")
        self._plans, self._results = desk.kept, worker_desk.kept
        self.scheduler = Scheduler(desk)
        runner = FakeRunner(PAGE_SIZE, MODEL.vocab_size)
        runner.pages = PAGES
        self._worker = Worker(worker_desk, 0, runner)
        self._decode_plan, self._decode_result = Codec(ToWorker).decode, Codec(FromWorker).decode
        self._next = 0
        self.step()

    def submit(self, prompt: list[int], max_tokens: int) -> None:
        self._next += 1
        self.scheduler.receive(Submit(self._next, "tokenizer-0", prompt, Sampling(max_tokens=max_tokens, ignore_eos=True), seed=self._next))

    def fresh_prompt(self, length: int) -> list[int]:
        """Unlike every other from its first page on."""
        return [256 + (self._next * 7919 + place * 31) % 30_000 for place in range(length - 1)] + [self._next]

    def step(self) -> float:
        """The worker's step, then the scheduler's, of which the CPU time is returned, in microseconds."""
        while self._plans and not self._results:
            self._worker.receive(self._decode_plan(self._plans.popleft()))
        begun = time.thread_time_ns()
        if self._results:
            self.scheduler.receive(self._decode_result(self._results.popleft()))
        self.scheduler.settle()
        return (time.thread_time_ns() - begun) / 1000

    def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self.step()


def measure(running: int, waiting: int, cached: int, steps: int) -> dict[str, Any]:
    """The CPU time of a step, microseconds."""
    rig = Rig(running)
    collect_seldom()
    progress = rig.scheduler.progress
    for _ in range(cached // CACHED_PROMPT):
        rig.submit(rig.fresh_prompt(CACHED_PROMPT), 1)
    rig.until(lambda: progress().running == progress().waiting == 0)
    for _ in range(running):
        rig.submit(rig.fresh_prompt(PROMPT), MOST_TOKENS)
    rig.until(lambda: progress().running == running)
    for _ in range(waiting):
        rig.submit(rig.fresh_prompt(PROMPT), MOST_TOKENS)
    for _ in range(steps // 10 + 5):
        rig.step()
    # The quietest of some rounds: others may use the machine as well.
    times = min(([rig.step() for _ in range(steps)] for _ in range(ROUNDS)), key=median)
    after = progress()
    assert (after.running, after.waiting) == (running, waiting), after
    return {
        "running": running,
        "waiting": waiting,
        "cached_tokens": cached,
        "us_a_step_p50": round(median(times), 1),
        "us_a_step_p99": round(quantiles(times, n=100)[-1], 1),
        "us_a_step_mean": round(sum(times) / len(times), 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Time the scheduler alone.")
    parser.add_argument("--json", type=Path, help="write the figures to this file, such as scripts/bench/results/scheduler.json")
    parser.add_argument("--steps", type=int, default=100, help="in each round of each measurement (default: %(default)s)")
    arguments = parser.parse_args()
    print(f"{'running':>8} {'waiting':>8} {'cached':>10} {'µs a step: p50':>16} {'mean':>8} {'p99':>8} {'µs a request':>13}")
    found = []
    for cached in (0, CACHED):
        for waiting in (0, WAITING):
            for running in RUNNING:
                one = measure(running, waiting, cached, arguments.steps)
                found.append(one)
                middle, mean, high = (one[f"us_a_step_{name}"] for name in ("p50", "mean", "p99"))
                print(
                    f"{running:8} {waiting:8} {cached:10} {middle:16.0f} {mean:8.0f} {high:8.0f} {middle / running:13.2f}",
                    flush=True,
                )
    worst = max(one["us_a_step_p50"] for one in found if one["running"] == 256)
    print(f"{'met   ' if worst <= GOAL_US else 'MISSED'}  µs a step at 256 running: {worst:.0f} (goal {GOAL_US:.0f})")
    if arguments.json:
        result = {"schema": "headrace-scheduler/1", "goal_us": GOAL_US, "steps": found, "machine": msgspec.to_builtins(facts())}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
