#!/usr/bin/env python3
"""Measure on a running engine what the scheduler promises: scripts/bench/under_load.py [--measure NAME …] [-- OPTIONS OF serve]

    starvation   a long prompt arrives among 16 decoding streams: their inter-token latency, beside that of the same tokens without it, and
                 its own time to the first token, beside what it takes alone and what these tokens take
    flood        one tenant sends hundreds of requests at once: another tenant's time to the first token, beside that of an idle engine
    overload     ten times as many requests as the engine can serve: what still gets done, how soon the others are told
    restart      the worker is killed while it serves: how soon the stream that it ran goes on
    soak         random load with a fifth of it aborted: memory and pages, from the end of the warm-up on

The load comes from this process, on the same cores, over connections that cost it little (`headrace.client.bench.wire`); its share of them
is in the results. Times are a client's, over HTTP. All of it goes into one JSON file.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import sys
import time
from bisect import bisect
from collections import Counter
from collections.abc import Callable
from itertools import pairwise, repeat
from pathlib import Path
from typing import Any

import msgspec
import uvloop
from processes import SERVE, Engine, engine, name_of, parse, shares, tree

from headrace.client.bench.corpus import load_words
from headrace.client.bench.machine import facts
from headrace.client.bench.wire import Pool, Sample, request_bytes
from headrace.client.calls import Server

ONE, OTHER = "tenant-one", "tenant-other"
STREAMS = 16
SOME_MORE = 64
"""Tokens asked for beyond those compared: now and then two come as one piece, and what counts is pieces."""
TIMEOUT_S = 600.0
REFUSED = "http 429"


def first_s(sample: Sample) -> float:
    """The time to the first token."""
    return sample.times[0] - sample.sent


def gaps(sample: Sample, first: int, last: int) -> list[float]:
    """Seconds between its tokens from one to another."""
    return [b - a for a, b in pairwise(sample.times[first : last + 1])]


class Load:
    """Requests of distinct prompts to one engine."""

    def __init__(self, running: Engine, seed: int) -> None:
        self.running = running
        self.words = load_words(None)
        self.dice = random.Random(seed)
        self.pools = {key: Pool(Server.parse(running.address, key), TIMEOUT_S) for key in (ONE, OTHER)}

    def prompt(self, words: int) -> str:
        start = self.dice.randrange(max(1, len(self.words) - words))
        return f"{self.dice.randrange(1 << 30)} {' '.join(self.words[start : start + words])}"

    async def stream(
        self, prompt: str, tokens: int, key: str = ONE, sample: Sample | None = None, due: float | None = None, temperature: float = 0
    ) -> Sample:
        """One request to its end. Its times count from when it was `due`, where that was before now."""
        sample, pool = sample or Sample(tokens), self.pools[key]
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": temperature, "ignore_eos": True, "stream": True}
        await pool.send(request_bytes(pool.server, "POST", "/v1/completions", msgspec.json.encode(body)), sample, due)
        return sample

    async def metric(self, name: str) -> float:
        """The sum of all series of that name."""
        return await asyncio.to_thread(self.running.metric, name)

    def close(self) -> None:
        for pool in self.pools.values():
            pool.close()


async def starvation(load: Load, arguments: argparse.Namespace) -> dict[str, Any]:
    alone = [first_s(await load.stream(load.prompt(arguments.long_words), 1)) for _ in range(3)]
    prompts = [load.prompt(20) for _ in range(STREAMS)]
    others = [Sample() for _ in prompts]
    tasks = [asyncio.create_task(load.stream(*one)) for one in zip(prompts, repeat(arguments.decode_tokens), repeat(ONE), others)]
    while any(len(one.times) < 20 for one in others):
        await asyncio.sleep(0.05)
    await asyncio.sleep(arguments.calm_s)
    long = await load.stream(load.prompt(arguments.long_words), 1)
    still = sum(not task.done() for task in tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    # Which tokens of each came meanwhile. The further a stream is, the longer a token takes: so the same tokens are asked for again.
    spans = [(bisect(one.times, long.sent) - 1, bisect(one.times, long.times[0]) - 1) for one in others]
    again = await asyncio.gather(*(load.stream(prompt, last + SOME_MORE) for prompt, (_, last) in zip(prompts, spans, strict=True)))
    beside, calm = ([gap for one, span in zip(them, spans, strict=True) for gap in gaps(one, *span)] for them in (others, again))
    decoding_s = statistics.mean(one.times[last] - one.times[first] for one, (first, last) in zip(again, spans, strict=True))
    return {
        "tokens_meanwhile": sum(last - first for first, last in spans) / STREAMS,
        "itl_ms_p50_without": 1e3 * quantile(calm, 0.5),
        "itl_ms_p99_without": 1e3 * quantile(calm, 0.99),
        "itl_ms_p50_beside": 1e3 * quantile(beside, 0.5),
        "itl_ms_p99_beside": 1e3 * quantile(beside, 0.99),
        "itl_p50_rises": quantile(beside, 0.5) / quantile(calm, 0.5),
        "itl_p99_rises": quantile(beside, 0.99) / quantile(calm, 0.99),
        "ttft_s_alone": statistics.median(alone),
        "ttft_s_beside": first_s(long),
        "decoding_s_meanwhile": decoding_s,
        "ttft_over_all_work": first_s(long) / (statistics.median(alone) + decoding_s),
        "streams_still_decoding": still,
    }


async def flood(load: Load, arguments: argparse.Namespace) -> dict[str, Any]:
    async def probe(count: int) -> list[float]:
        found = []
        for _ in range(count):
            found.append(first_s(await load.stream(load.prompt(40), 8, OTHER)))
            await asyncio.sleep(0.3)
        return found

    idle = await probe(8)
    tasks = [asyncio.create_task(load.stream(load.prompt(40), 64, ONE)) for _ in range(arguments.flood)]
    while not await load.metric("headrace_requests_running"):
        await asyncio.sleep(0.05)
    flooded = await probe(8)
    waiting = await load.metric("headrace_requests_waiting") + await load.metric("headrace_requests_running")
    results = await asyncio.gather(*tasks)
    own = [first_s(one) for one in results if one.times]
    return {
        "requests_of_the_flood": arguments.flood,
        "of_them_left_at_the_last_probe": waiting,
        "ttft_ms_idle_p50": 1e3 * quantile(idle, 0.5),
        "ttft_ms_flooded_p50": 1e3 * quantile(flooded, 0.5),
        "ttft_ms_flooded_max": 1e3 * max(flooded),
        "ttft_rises": quantile(flooded, 0.5) / quantile(idle, 0.5),
        "ttft_s_of_the_flood_p50": quantile(own, 0.5),
        "errors": dict(Counter(one.error for one in results if one.error)),
    }


async def overload(load: Load, arguments: argparse.Namespace) -> dict[str, Any]:
    words, tokens = 60, 48

    async def closed(streams: int, seconds: float) -> float:
        """Tokens a second of so many clients, each with one request after the other."""
        until, done = time.perf_counter() + seconds, 0

        async def client() -> None:
            nonlocal done
            while time.perf_counter() < until:
                one = await load.stream(load.prompt(words), tokens)
                done += sum(at <= until for at in one.times)

        await asyncio.gather(*(client() for _ in range(streams)))
        return done / seconds

    await closed(32, 5)
    peak = max([await closed(streams, arguments.seconds / 4) for streams in (32, 64)])
    rate = 10 * peak / tokens
    before, own_before = load.running.usage(), time.process_time()
    begun = time.perf_counter()
    ends = begun + arguments.seconds
    tasks = []
    while (now := time.perf_counter()) < ends:
        due = begun + len(tasks) / rate
        if now < due:
            await asyncio.sleep(due - now)
        tasks.append(asyncio.create_task(load.stream(load.prompt(words), tokens, due=due)))
    cores = shares(before, load.running.usage(), arguments.seconds)
    cores["load generator"] = round((time.process_time() - own_before) / arguments.seconds, 4)
    results = await asyncio.gather(*tasks)
    served = [one for one in results if not one.error]
    refused = [1e3 * (one.ended - one.sent) for one in results if one.error == REFUSED]
    # Whole answers count, by the time between the first second, in which the engine fills, and the last request's arrival.
    good = sum(begun + 2 <= at <= ends for one in served for at in one.times) / (arguments.seconds - 2)
    return {
        "peak_tok_s": peak,
        "offered_requests_s": len(results) / arguments.seconds,
        "goodput_tok_s": good,
        "cores_meanwhile": cores,
        "goodput_of_peak": good / peak,
        "served": len(served),
        "refused": len(refused),
        "refused_ms_p50": quantile(refused, 0.5) if refused else None,
        "refused_ms_p99": quantile(refused, 0.99) if refused else None,
        "other_errors": dict(Counter(one.error for one in results if one.error not in (None, REFUSED))),
    }


async def restart(load: Load, arguments: argparse.Namespace) -> dict[str, Any]:
    sample, found = Sample(), []
    task = asyncio.create_task(load.stream(load.prompt(20), arguments.decode_tokens, sample=sample))

    async def comes(more: Callable[[], bool]) -> None:
        while not more():
            if task.done():
                raise SystemExit(f"the stream ended before its time: {sample.error}")
            await asyncio.sleep(0.005)

    for killed in range(arguments.kills):
        seen = len(sample.times)
        await comes(lambda seen=seen: len(sample.times) > seen + 20)
        pid = next(pid for pid in tree(load.running.supervisor.pid) if name_of(pid) == "worker-0")
        os.kill(pid, signal.SIGKILL)
        at = time.perf_counter()
        while await load.metric("headrace_recovery_seconds_count") <= killed:
            await asyncio.sleep(0.02)
        back = time.perf_counter()
        await comes(lambda back=back: sample.times[-1] > back)
        # What had been sent may come for a moment. Then there is a gap.
        after = [one for one in sample.times if one >= at]
        found.append(max(pairwise([at, *after]), key=lambda pair: pair[1] - pair[0])[1] - at)
    recovered = await load.metric("headrace_recovery_seconds_sum") / await load.metric("headrace_recovery_seconds_count")
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return {"kills": arguments.kills, "next_token_s": found, "next_token_s_max": max(found), "process_is_back_s_mean": recovered}


async def soak(load: Load, arguments: argparse.Namespace) -> dict[str, Any]:
    ends = time.perf_counter() + arguments.soak
    warm = time.perf_counter() + arguments.soak / 4
    kinds: Counter[str] = Counter()
    memory: list[tuple[float, dict[str, float]]] = []

    async def client() -> None:
        while time.perf_counter() < ends:
            tokens, words = load.dice.randrange(1, 120), int(load.dice.expovariate(1 / 60)) + 1
            prompt = load.prompt(words) if load.dice.random() < 0.7 else " ".join(load.words[: words + 50])
            key, temperature = load.dice.choice((ONE, OTHER)), load.dice.choice((0.0, 1.0))
            request = asyncio.create_task(load.stream(prompt, tokens, key, temperature=temperature))
            if load.dice.random() < 0.2:
                done, _ = await asyncio.wait({request}, timeout=load.dice.random() * 2)
                if not done:
                    request.cancel()
                    await asyncio.wait({request})
                    kinds["aborted"] += 1
                    continue
            one = await request
            kinds[f"error: {one.error}" if one.error else "ended"] += 1

    async def watch() -> None:
        while time.perf_counter() < ends:
            await asyncio.sleep(arguments.soak / 60)
            if time.perf_counter() > warm:
                memory.append((time.perf_counter(), {name: usage.rss_mib for name, usage in load.running.usage().items()}))

    await asyncio.gather(watch(), *(client() for _ in range(32)))
    deadline = time.perf_counter() + 10
    while await load.metric("headrace_requests_running") and time.perf_counter() < deadline:
        await asyncio.sleep(0.2)
    quarter = max(1, len(memory) // 4)

    def total(samples: list[tuple[float, dict[str, float]]]) -> float:
        return statistics.median(sum(one.values()) for _, one in samples)

    first, last = memory[:quarter], memory[-quarter:]
    by_process = {
        name: [round(statistics.median(one[name] for _, one in part if name in one), 1) for part in (first, last)] for name in memory[-1][1]
    }
    return {
        "seconds": arguments.soak,
        "requests": dict(kinds),
        "mib_after_warm_up": total(first),
        "mib_at_the_end": total(last),
        "growth": total(last) / total(first) - 1,
        "mib_by_process": by_process,
        "pages_in_use_at_the_end": await load.metric("headrace_kv_pages") - await _idle_pages(load),
        "requests_in_tables_at_the_end": await load.metric("headrace_tokenizer_live_requests"),
    }


async def _idle_pages(load: Load) -> float:
    series = await asyncio.to_thread(load.running.metrics)
    return sum(value for name, value in series.items() if name.startswith("headrace_kv_pages{") and "used" not in name)


MEASURES = {"starvation": starvation, "flood": flood, "overload": overload, "restart": restart, "soak": soak}
GOALS = {
    ("starvation", "itl_p99_rises"): 2.0,
    ("starvation", "ttft_over_all_work"): 1.3,
    ("flood", "ttft_rises"): 2.0,
    ("overload", "goodput_of_peak"): -0.9,  # at least
    ("overload", "refused_ms_p99"): 50.0,
    ("restart", "next_token_s_max"): 1.0,
    ("soak", "growth"): 0.02,
    ("soak", "pages_in_use_at_the_end"): 0.0,
}
"""The most that each may be."""


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


async def measure(running: Engine, arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    found = {}
    for name in arguments.measure:
        load = Load(running, arguments.seed)
        found[name] = await MEASURES[name](load, arguments)
        load.close()
        print(f"{name}: {json.dumps(found[name], default=str)}", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure what the scheduler promises under load.")
    parser.add_argument("--measure", nargs="+", choices=MEASURES, default=list(MEASURES), help="default: all")
    parser.add_argument("--seconds", type=float, default=60.0, help="of overload (default: 60)")
    parser.add_argument("--soak", type=float, default=1800.0, metavar="SECONDS", help="of soaking (default: 1800)")
    parser.add_argument("--kills", type=int, default=5, metavar="N", help="of the worker, by restart (default: 5, what a minute may have)")
    parser.add_argument("--flood", type=int, default=500, metavar="REQUESTS", help="default: 500")
    parser.add_argument(
        "--long-words", type=int, default=5600, metavar="N", help="words of the long prompt (default: 5600, about 8,000 tokens)"
    )
    parser.add_argument("--decode-tokens", type=int, default=4000, metavar="N", help="of each stream beside it (default: 4000)")
    parser.add_argument("--calm-s", type=float, default=10.0, metavar="S", help="of decoding before it comes (default: 10)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of prompts; the same again would be found in the prefix cache")
    parser.add_argument("--json", type=Path, default=Path("build/bench/under_load.json"), help="default: %(default)s")
    arguments = parse(parser)
    with engine(SERVE, "--port", "0", "--api-key", f"{ONE},{OTHER}", *arguments.serve) as running:
        running.wait_until_ready()
        found = uvloop.run(measure(running, arguments))
    goals = []
    for (name, key), most in GOALS.items():
        if name in found and found[name][key] is not None:
            value = found[name][key]
            goals.append(
                {"goal": f"{name}: {key}", "wanted": abs(most), "found": value, "met": value >= -most if most < 0 else value <= most}
            )
    result = {
        "schema": "headrace-under-load/1",
        "options": arguments.serve,
        "measured": found,
        "goals": goals,
        "machine": msgspec.to_builtins(facts()),
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    for goal in goals:
        print(f"{'met   ' if goal['met'] else 'MISSED'}  {goal['goal']}: {goal['found']:.2f} (goal {goal['wanted']})")
    print(f"saved {arguments.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
