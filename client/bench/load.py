"""One measurement: warm up, start the clock, keep the server busy by the wanted pace, stop the clock.

    concurrency N    N runners, each with one request in flight
    request rate R   a request every exponentially distributed gap, however many are in flight (an open loop, which shows queueing)

Gives back the raw samples; what they mean is `report`'s matter.
"""

import asyncio
import random
import resource
from collections.abc import Iterator
from time import perf_counter

import msgspec

from headrace.client.bench.dialect import Dialect, discover, error_text
from headrace.client.bench.machine import CpuTimes, cpu_times
from headrace.client.bench.options import Options
from headrace.client.bench.progress import Progress
from headrace.client.bench.prompts import TextPrompts, TokenPrompts, prepare
from headrace.client.bench.wire import Pool, Sample, request_bytes
from headrace.client.calls import Server
from headrace.engine.errors import UserError

_RATE_SEED = 0x5EED


class Run(msgspec.Struct):
    """What one measurement saw."""

    options: Options
    dialect: Dialect
    samples: list[Sample]
    wall_s: float
    """From the first request sent to the last one ended."""
    generator_cpu_s: float
    """CPU time of this load generator within it."""
    machine_before: CpuTimes
    machine_after: CpuTimes
    prompts_how: str
    prompts_repeated: bool


async def measure(options: Options, words: list[str], progress: Progress) -> Run:
    """Run one measurement. Failed requests are samples with an error; `UserError` only when nothing can be measured."""
    try:
        server = Server.parse(options.url, options.api_key)
    except ValueError as error:
        raise UserError(str(error)) from None
    progress.say(f"asking {options.url} what it understands")
    dialect = await discover(server, options, " ".join(words[:12]))
    progress.say("preparing prompts")
    try:
        prompts = await prepare(server, dialect, options, words)
    except OSError as error:
        raise UserError(f"the server at {options.url} went away: {error}") from None
    pool = Pool(server, options.timeout)
    try:
        await _warm_up(pool, dialect, options, prompts, progress)
        await _open(pool, options)
        load = _Load(pool, dialect, options, prompts)
        before, cpu_before = cpu_times(), _own_cpu_s()
        progress.start(options.requests, options.duration, load.samples)
        try:
            await load.run()
        finally:
            progress.stop()
        after, cpu_after = cpu_times(), _own_cpu_s()
    finally:
        pool.close()
    first = min(sample.sent for sample in load.samples)
    last = max(sample.ended for sample in load.samples)
    return Run(options, dialect, load.samples, last - first, cpu_after - cpu_before, before, after, prompts.how, prompts.repeated)


async def _warm_up(pool: Pool, dialect: Dialect, options: Options, prompts: TokenPrompts | TextPrompts, progress: Progress) -> None:
    waiting = [(prompts.apart(), options.output_tokens) for _ in range(options.warmup)]
    if options.warm:
        waiting.append((prompts.prefix, 1))
    for number, (prompt, tokens) in enumerate(waiting, 1):
        progress.say(f"warming up: {number} of {len(waiting)}")
        sample = Sample(tokens)
        await pool.send(request_bytes(pool.server, "POST", dialect.path, dialect.body(prompt, tokens, options.temperature)), sample)
        if sample.error:
            raise UserError(f"a warm-up request failed: {sample.error} {error_text(bytes(sample.body)) if sample.body else ''}".rstrip())


async def _open(pool: Pool, options: Options) -> None:
    try:
        await pool.open(options.concurrency or 1)
    except (TimeoutError, OSError) as error:
        raise UserError(f"cannot open {options.concurrency} connections to {options.url}: {error}") from None


def _own_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class _Load:
    """The clock is running."""

    def __init__(self, pool: Pool, dialect: Dialect, options: Options, prompts: TokenPrompts | TextPrompts) -> None:
        self.samples: list[Sample] = []
        self._pool = pool
        self._dialect = dialect
        self._options = options
        self._prompts = prompts

    async def run(self) -> None:
        if self._options.request_rate is not None:
            await self._arrive(self._options.request_rate)
            return
        ticket = self._tickets()
        await asyncio.gather(*(self._keep_one_in_flight(ticket) for _ in range(self._options.concurrency or 1)))

    def _tickets(self) -> Iterator[None]:
        """One for each request to start."""
        deadline = None if self._options.duration is None else perf_counter() + self._options.duration
        while deadline is None or perf_counter() < deadline:
            if self._options.requests is not None and len(self.samples) >= self._options.requests:
                return
            yield

    async def _keep_one_in_flight(self, ticket: Iterator[None]) -> None:
        for _ in ticket:
            sample = await self._one()
            if sample.error == "connect":
                # Nothing listens any more: do not spin through the rest of a duration.
                await asyncio.sleep(0.1)

    async def _arrive(self, rate: float) -> None:
        gaps = random.Random(self._options.seed ^ _RATE_SEED)
        due = perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in self._tickets():
                if (wait := due - perf_counter()) > 0:
                    await asyncio.sleep(wait)
                group.create_task(self._one(due))
                await asyncio.sleep(0)
                due += gaps.expovariate(rate)

    async def _one(self, due: float | None = None) -> Sample:
        options, dialect = self._options, self._dialect
        sample = Sample(options.output_tokens)
        self.samples.append(sample)
        body = dialect.body(self._prompts.next(), options.output_tokens, options.temperature)
        await self._pool.send(request_bytes(self._pool.server, "POST", dialect.path, body), sample, due)
        return sample
