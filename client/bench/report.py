"""What a measurement means: samples in, one `Report` out, which is the table on the terminal and the JSON in the file.

    TTFT  from the request's start (or when it was due) to its first chunk with text
    TPOT  (last chunk - first chunk) / (tokens - 1), one value a request
    ITL   every gap between two chunks with text, all requests together
    e2e   from the request's start to the end of its response

Tokens are counted by the server's usage and checked against the chunks. Failed requests count as errors and nowhere else.
"""

import re
import time
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

import msgspec

from headrace.client.bench.dialect import Dialect, error_text
from headrace.client.bench.load import Run
from headrace.client.bench.machine import Machine, facts
from headrace.client.bench.options import Options
from headrace.client.bench.wire import Sample

SCHEMA = "headrace-bench/1"
_BUSY_GENERATOR = 0.7
_STOLEN_SHARE = 0.02
_DATA = re.compile(rb"^data: ?(.*)$", re.MULTILINE)


class Spread(msgspec.Struct):
    """A distribution. Percentiles are values that were seen (nearest rank)."""

    mean: float
    p50: float
    p90: float
    p99: float
    least: float
    most: float
    count: int


class Tokens(msgspec.Struct):
    """Sums over all completed requests."""

    prompt: int
    output: int
    cached: int | None
    """Prompt tokens that the server took from a cache; None when it does not say."""
    counted_by: str
    """"usage" of the server, or "chunks" where it reports none."""
    chunks: int
    prompt_least: int
    prompt_most: int


class Generator(msgspec.Struct):
    """What the load generator itself used while the clock ran."""

    cpu_s: float
    cpu_share: float
    """Of one core."""
    us_per_chunk: float | None


class Report(msgspec.Struct):
    """One measurement. Latencies are in milliseconds, rates per second of wall time."""

    schema: str
    finished_at: str
    headrace: str
    url: str
    model: str
    options: Options
    server: Dialect
    prompts: str
    wall_s: float
    requests: int
    completed: int
    errors: dict[str, int]
    error_example: str | None
    tokens: Tokens
    output_tok_s: float
    prompt_tok_s: float
    requests_s: float
    decode_tok_s: float | None
    """Of one stream: the inverse of the median TPOT."""
    ttft_ms: Spread | None
    tpot_ms: Spread | None
    itl_ms: Spread | None
    e2e_ms: Spread | None
    generator: Generator
    machine: Machine
    machine_busy_cores: float
    """Mean over the wall time, everything on the machine together."""
    machine_stolen_share: float
    """CPU time that the hypervisor took away, by the machine's whole."""
    notes: list[str]


def summarize(run: Run) -> Report:
    """The report of a run."""
    completed = [sample for sample in run.samples if sample.error is None]
    failed = [sample for sample in run.samples if sample.error is not None]
    wall = max(run.wall_s, 1e-9)
    tokens, tpots = _count(completed)
    tpot = spread(tpots)
    chunks_seen = sum(len(sample.times) for sample in run.samples)
    machine = facts()
    cores = max(machine.cores, 1)
    report = Report(
        schema=SCHEMA,
        finished_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        headrace=_version(),
        url=run.options.url,
        model=run.dialect.model,
        options=msgspec.structs.replace(run.options, api_key=None),
        server=run.dialect,
        prompts=run.prompts_how,
        wall_s=run.wall_s,
        requests=len(run.samples),
        completed=len(completed),
        errors=dict(Counter(sample.error or "" for sample in failed).most_common()),
        error_example=_example(failed),
        tokens=tokens,
        output_tok_s=tokens.output / wall,
        prompt_tok_s=tokens.prompt / wall,
        requests_s=len(completed) / wall,
        decode_tok_s=1000 / tpot.p50 if tpot and tpot.p50 else None,
        ttft_ms=spread((sample.times[0] - sample.sent) * 1000 for sample in completed if sample.times),
        tpot_ms=tpot,
        itl_ms=spread((after - before) * 1000 for sample in completed for before, after in pairwise(sample.times)),
        e2e_ms=spread((sample.ended - sample.sent) * 1000 for sample in completed),
        generator=Generator(
            run.generator_cpu_s,
            run.generator_cpu_s / wall,
            run.generator_cpu_s / chunks_seen * 1e6 if chunks_seen else None,
        ),
        machine=machine,
        machine_busy_cores=(run.machine_after.busy_s - run.machine_before.busy_s) / wall,
        machine_stolen_share=(run.machine_after.stolen_s - run.machine_before.stolen_s) / wall / cores,
        notes=[],
    )
    report.notes = list(_notes(report, completed, run))
    return report


def spread(values: Iterable[float]) -> Spread | None:
    """The distribution of `values`; None of nothing."""
    ordered = sorted(values)
    if not ordered:
        return None
    count = len(ordered)

    def percentile(share: float) -> float:
        # Nearest rank: the smallest value that at least this share does not exceed.
        return ordered[max(0, -int(-share * count // 1) - 1)]

    return Spread(sum(ordered) / count, percentile(0.5), percentile(0.9), percentile(0.99), ordered[0], ordered[-1], count)


def _count(completed: list[Sample]) -> tuple[Tokens, list[float]]:
    """Token sums, and each request's TPOT in milliseconds."""
    prompt = output = cached = chunks = 0
    prompt_lengths: list[int] = []
    tpots: list[float] = []
    says_cached = False
    by_usage = bool(completed)
    for sample in completed:
        usage = _usage(sample)
        own = len(sample.times)
        chunks += own
        if usage is None:
            by_usage = False
        else:
            own = int(usage.get("completion_tokens") or 0)
            prompt_lengths.append(int(usage.get("prompt_tokens") or 0))
            prompt += prompt_lengths[-1]
            details = usage.get("prompt_tokens_details")
            if isinstance(details, dict) and isinstance(details.get("cached_tokens"), int):
                says_cached = True
                cached += details["cached_tokens"]
        output += own
        if own > 1 and len(sample.times) > 1:
            tpots.append((sample.times[-1] - sample.times[0]) * 1000 / (own - 1))
    tokens = Tokens(
        prompt,
        output,
        cached if says_cached else None,
        "usage" if by_usage else "chunks",
        chunks,
        min(prompt_lengths, default=0),
        max(prompt_lengths, default=0),
    )
    return tokens, tpots


def _usage(sample: Sample) -> dict | None:
    for block in reversed(sample.tail):
        if b'"usage"' not in block:
            continue
        try:
            usage = msgspec.json.decode(b"\n".join(_DATA.findall(block)) or block).get("usage")
        except (msgspec.DecodeError, AttributeError):
            continue
        if isinstance(usage, dict):
            return usage
    return None


def _example(failed: list[Sample]) -> str | None:
    for sample in failed:
        if sample.body:
            return error_text(bytes(sample.body))
        if sample.error == "error event" and sample.tail:
            return error_text(b"\n".join(_DATA.findall(sample.tail[-1])) or sample.tail[-1])
    return None


def _notes(report: Report, completed: list[Sample], run: Run) -> Iterable[str]:
    """What a reader must know before believing the figures."""
    tokens, options = report.tokens, run.options
    if tokens.counted_by == "chunks" and completed:
        yield "the server reported no usage for some requests: their tokens are counted as chunks, their prompts not at all"
    short = sum(1 for sample in completed if sample.finish_reason not in (None, "length"))
    if short:
        yield f"{short} of {len(completed)} requests ended before {options.output_tokens} tokens"
    if options.ignore_eos and not run.dialect.ignore_eos:
        yield "the server does not take ignore_eos: output lengths are the model's choice"
    if tokens.chunks and abs(tokens.output / tokens.chunks - 1) > 0.02:
        yield f"{tokens.output / tokens.chunks:.2f} tokens came in each chunk: ITL is between chunks, TPOT counts tokens"
    low, high = options.prompt_tokens[0] + options.shared_prefix, options.prompt_tokens[1] + options.shared_prefix
    if tokens.prompt_most and not low <= tokens.prompt_least <= tokens.prompt_most <= high:
        yield f"prompts had {tokens.prompt_least}-{tokens.prompt_most} tokens by the server's count, {low}-{high} were wanted"
    if tokens.cached and not options.shared_prefix and tokens.cached > 0.05 * tokens.prompt:
        yield f"{tokens.cached} prompt tokens came from the server's cache though all prompts differ: use another --seed"
    if run.prompts_repeated:
        yield "there were more requests than prepared prompts, so some were sent twice"
    if report.generator.cpu_share > _BUSY_GENERATOR:
        yield f"the load generator used {report.generator.cpu_share:.0%} of a core: latencies include its own"
    if report.machine_stolen_share > _STOLEN_SHARE:
        yield f"the hypervisor took {report.machine_stolen_share:.1%} of the machine's CPU time: repeat on a quiet machine"


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("headrace")
    except PackageNotFoundError:
        return "source"


def table(report: Report) -> str:
    """The report for a terminal."""
    options, tokens = report.options, report.tokens
    low, high = options.prompt_tokens
    pace = f"concurrency {options.concurrency}" if options.request_rate is None else f"{options.request_rate:g} requests/s"
    size = f"{low}" if low == high else f"{low}-{high}"
    prefix = f"{options.shared_prefix} shared{' (warm)' if options.warm else ''} + " if options.shared_prefix else ""
    lines = [
        f"{report.model} at {report.url} ({options.endpoint}), seed {options.seed}",
        f"{pace} · {prefix}{size} tokens in ({report.prompts}) · {options.output_tokens} out",
        "",
        f"{'':10}{'mean':>10}{'p50':>10}{'p90':>10}{'p99':>10}{'max':>10}",
    ]
    for name, values in (("TTFT", report.ttft_ms), ("TPOT", report.tpot_ms), ("ITL", report.itl_ms), ("e2e", report.e2e_ms)):
        if values:
            figures = (values.mean, values.p50, values.p90, values.p99, values.most)
            lines.append(f"{name + ' ms':10}" + "".join(f"{figure:10.2f}" for figure in figures))
    cached = "" if tokens.cached is None else f", {tokens.cached} of them cached"
    decode = "" if report.decode_tok_s is None else f" · {report.decode_tok_s:.1f} in one stream"
    lines += [
        "",
        f"output     {report.output_tok_s:10.1f} tok/s   ({tokens.output} tokens by {tokens.counted_by}{decode})",
        f"prompt     {report.prompt_tok_s:10.1f} tok/s   ({tokens.prompt} tokens{cached})",
        f"requests   {report.requests_s:10.2f} /s      ({report.completed} of {report.requests} in {report.wall_s:.2f} s)",
    ]
    for kind, count in report.errors.items():
        lines.append(f"error      {count:10d} × {kind}")
    if report.error_example:
        lines.append(f"           such as: {report.error_example}")
    lines += [f"note: {note}" for note in report.notes]
    return "\n".join(lines)
