#!/usr/bin/env python3
"""Time the control plane alone: every process of the engine, the real tokenizer, but a worker that computes nothing.

    scripts/bench/control_plane.py [--json FILE] [--seconds S] [--set KEY=VALUE …]

What it measures: streamed tokens a second at concurrency 1, 32 and 256 through HTTP, short requests a second, the same through the
direct client without HTTP, and which process the CPU time went to. As the worker answers at once, the time between two tokens is what
the control plane adds to each. The load generator runs on the same cores, and its own share is in the report.
"""

import argparse
import asyncio
import json
import socket
import sys
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import msgspec
import uvloop
from processes import Engine, engine, shares

from headrace.client.bench.corpus import load_words
from headrace.client.bench.load import measure
from headrace.client.bench.machine import facts
from headrace.client.bench.options import Options
from headrace.client.bench.progress import Progress
from headrace.client.bench.report import Report, summarize, table
from headrace.client.bench.wire import Sample
from headrace.client.direct import DirectClient
from headrace.engine.messages.frontend import Accepted, End, Failed, Generate, PromptScores, Scores, TextPrompt
from headrace.engine.messages.sampling import Sampling

SERVE = """
import sys, msgspec
from headrace.engine.checkpoint.resolve import resolve
from headrace.engine.config import Config
from headrace.engine.fork_server import ForkServer
from headrace.engine.supervisor import run
config = msgspec.json.decode(sys.argv[1], type=Config)
with ForkServer() as forks:
    sys.exit(run(config, resolve(config), forks, worker_module="headrace.workers.fake"))
"""
GOAL_TOKENS_S = 20_000
GOAL_ADDED_MS = 0.5
GOAL_REQUESTS_S = 500


class Meter(Progress):
    """Reads the processes' CPU times exactly while the clock runs."""

    def __init__(self, label: str, running: Engine) -> None:
        super().__init__(label)
        self._running = running
        self.cpu_shares: dict[str, float] = {}

    def start(self, total: int | None, duration: float | None, samples: list[Sample]) -> None:
        self._before, self._began = self._running.usage(), perf_counter()
        super().start(total, duration, samples)

    def stop(self) -> None:
        self.cpu_shares = shares(self._before, self._running.usage(), perf_counter() - self._began)
        super().stop()


class Stopwatch:
    """A sink that notes when text came."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.tokens = 0
        self.done = asyncio.get_running_loop().create_future()

    def accepted(self, message: Accepted) -> None: ...

    def prompt_scores(self, message: PromptScores) -> None: ...

    def text(self, text: str, count: int, scores: Scores | None, now: float) -> None:
        self.times.append(perf_counter())
        self.tokens += count

    def end(self, message: End, now: float) -> None:
        self.done.set_result(None)

    def failed(self, message: Failed) -> None:
        self.done.set_exception(RuntimeError(message.message))


async def direct(running: Engine, concurrency: int, requests: int, tokens: int) -> dict[str, Any]:
    """The same load without HTTP: first token and time a token (milliseconds), tokens a second."""
    client = DirectClient(running.run_dir, ["tokenizer-0"])
    first: list[float] = []
    between: list[float] = []
    total = 0
    waiting = iter(range(requests))

    async def runner() -> None:
        nonlocal total
        for number in waiting:
            watch = Stopwatch()
            sent = perf_counter()
            prompt = TextPrompt(f"{number} times the wheel has turned and the water goes on to the next mill")
            sampling = Sampling(max_tokens=tokens, ignore_eos=True, temperature=0.0)
            client.generate(Generate(client.new_ids(1), (number,), prompt, sampling), [watch])
            await watch.done
            total += watch.tokens
            first.append((watch.times[0] - sent) * 1000)
            if watch.tokens > 1:
                between.append((watch.times[-1] - watch.times[0]) * 1000 / (watch.tokens - 1))

    before, began = running.usage(), perf_counter()
    await asyncio.gather(*(runner() for _ in range(concurrency)))
    seconds = perf_counter() - began
    used = cpu(shares(before, running.usage(), seconds), total / seconds)
    client.close()
    return {
        "tokens_s": total / seconds,
        "ttft_ms_p50": median(first),
        "tpot_ms_p50": median(between) if between else None,
        "cpu": used,
    }


def http(running: Engine, words: list[str], label: str, **load: Any) -> tuple[Report, dict[str, dict[str, float]]]:
    meter = Meter(f"{label}: ", running)
    options = Options(url=running.address, requests=None, warmup=2, **load)
    report = summarize(uvloop.run(measure(options, words, meter)))
    used = cpu(meter.cpu_shares, report.output_tok_s)
    print(f"--- {label}\n{table(report)}\ncpu, us a token: {used['us_a_token']}\n", flush=True)
    return report, used


def cpu(cpu_shares: dict[str, float], tokens_s: float) -> dict[str, dict[str, float]]:
    """CPU time by process: of a core, and for each token, which says more on a machine that others use as well."""
    each = {name: round(share / tokens_s * 1e6, 1) for name, share in cpu_shares.items() if tokens_s}
    return {"shares": cpu_shares, "us_a_token": each | {"all": round(sum(each.values()), 1)}}


def main() -> int:
    parser = argparse.ArgumentParser(description="Time the control plane with a worker that computes nothing.")
    parser.add_argument("--json", type=Path, default=Path("build/bench/control_plane.json"), help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=6.0, help="for each measurement (default: 6)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the engine, its value as JSON")
    arguments = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        settings: dict[str, Any] = {"port": free.getsockname()[1]}
    settings |= {key: json.loads(value) for key, _, value in (pair.partition("=") for pair in arguments.set)}
    words = load_words(None)
    result: dict[str, Any] = {"schema": "headrace-control-plane/1", "settings": settings, "http": {}, "direct": {}}
    loads = {
        "concurrency 1": {"concurrency": 1, "prompt_tokens": (32, 32), "output_tokens": 512},
        "concurrency 32": {"concurrency": 32, "prompt_tokens": (32, 32), "output_tokens": 256},
        "concurrency 256": {"concurrency": 256, "prompt_tokens": (32, 32), "output_tokens": 256},
        "short requests": {"concurrency": 32, "prompt_tokens": (16, 16), "output_tokens": 2},
    }
    with engine(SERVE, json.dumps(settings)) as running:
        running.wait_until_ready()
        for seed, (label, load) in enumerate(loads.items()):
            # A seed for each: the same prompts again would be found in the prefix cache.
            report, used = http(running, words, label, duration=arguments.seconds, seed=seed, **load)
            result["http"][label] = msgspec.to_builtins(report) | {"cpu": used}
        for label, concurrency, requests in (("concurrency 1", 1, 6), ("concurrency 256", 256, 512)):
            result["direct"][label] = uvloop.run(direct(running, concurrency, requests, 256))
            print(f"--- direct, {label}\n{result['direct'][label]}\n", flush=True)
        result["rss_mib"] = {name: round(usage.rss_mib, 1) for name, usage in running.usage().items()}
    result["goals"] = goals(result["http"])
    result["machine"] = msgspec.to_builtins(facts())
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    for goal in result["goals"]:
        print(f"{'met   ' if goal['met'] else 'MISSED'}  {goal['goal']}: {goal['found']:.2f} (goal {goal['wanted']})")
    print(f"saved {arguments.json}")
    return 0 if not any(load["errors"] for load in result["http"].values()) else 1


def goals(loads: dict[str, Any]) -> list[dict[str, Any]]:
    """What was wanted and what was found."""
    tokens_s = loads["concurrency 256"]["output_tok_s"]
    added_ms = loads["concurrency 1"]["tpot_ms"]["p50"]
    requests_s = loads["short requests"]["requests_s"]
    return [
        {"goal": "tokens/s at concurrency 256", "wanted": GOAL_TOKENS_S, "found": tokens_s, "met": tokens_s >= GOAL_TOKENS_S},
        {"goal": "ms added a token at concurrency 1", "wanted": GOAL_ADDED_MS, "found": added_ms, "met": added_ms <= GOAL_ADDED_MS},
        {"goal": "short requests/s", "wanted": GOAL_REQUESTS_S, "found": requests_s, "met": requests_s >= GOAL_REQUESTS_S},
    ]


if __name__ == "__main__":
    sys.exit(main())
