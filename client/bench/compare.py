"""Two servers measured in turn, A B A B …, since a machine's speed moves more from hour to hour than most
differences one looks for.

Both see the same prompts in the same round, and new ones in the next. Each round gives a ratio of its own;
the median of those is the answer.
"""

from collections.abc import Callable
from statistics import median

import msgspec

from headrace.client.bench.load import measure
from headrace.client.bench.options import Options
from headrace.client.bench.progress import Progress
from headrace.client.bench.report import Report, summarize

SCHEMA = "headrace-bench-compare/1"

_METRICS: tuple[tuple[str, bool, Callable[[Report], float | None]], ...] = (
    ("output tok/s", True, lambda report: report.output_tok_s),
    ("prompt tok/s", True, lambda report: report.prompt_tok_s),
    ("requests/s", True, lambda report: report.requests_s),
    ("TTFT p50 ms", False, lambda report: report.ttft_ms.p50 if report.ttft_ms else None),
    ("TTFT p99 ms", False, lambda report: report.ttft_ms.p99 if report.ttft_ms else None),
    ("TPOT p50 ms", False, lambda report: report.tpot_ms.p50 if report.tpot_ms else None),
    ("ITL p99 ms", False, lambda report: report.itl_ms.p99 if report.itl_ms else None),
    ("e2e p50 ms", False, lambda report: report.e2e_ms.p50 if report.e2e_ms else None),
    ("wall s", False, lambda report: report.wall_s),
)


class Round(msgspec.Struct):
    a: Report
    b: Report


class Ratio(msgspec.Struct):
    """One metric over all rounds."""

    metric: str
    higher_is_better: bool
    a: float
    """Median of A's rounds."""
    b: float
    ratio: float
    """Median over the rounds of A / B."""
    least: float
    most: float


class Comparison(msgspec.Struct):
    schema: str
    a: str
    b: str
    rounds: list[Round]
    ratios: list[Ratio]


async def compare(a: Options, b: Options, rounds: int, words: list[str]) -> Comparison:
    """Measure both `rounds` times. Raises `UserError`."""
    done: list[Round] = []
    for number in range(rounds):
        reports = []
        for name, options in (("A", a), ("B", b)):
            fresh = msgspec.structs.replace(options, seed=a.seed + number)
            label = f"round {number + 1}/{rounds} {name}: "
            reports.append(summarize(await measure(fresh, words, Progress(label))))
        done.append(Round(*reports))
    return Comparison(SCHEMA, a.url, b.url, done, list(_ratios(done)))


def _ratios(rounds: list[Round]):
    for metric, higher_is_better, value in _METRICS:
        pairs = [(value(one.a), value(one.b)) for one in rounds]
        known = [(first, second) for first, second in pairs if first and second]
        if len(known) == len(rounds):
            quotients = [first / second for first, second in known]
            middle_a, middle_b = median(first for first, _ in known), median(second for _, second in known)
            yield Ratio(metric, higher_is_better, middle_a, middle_b, median(quotients), min(quotients), max(quotients))


def table(comparison: Comparison) -> str:
    """The comparison for a terminal."""
    lines = [
        f"A {comparison.a}",
        f"B {comparison.b}",
        f"medians of {len(comparison.rounds)} rounds",
        "",
        f"{'':14}{'A':>12}{'B':>12}{'A/B':>8}   range over the rounds",
    ]
    for row in comparison.ratios:
        better = "" if 0.99 < row.ratio < 1.01 else "A better" if (row.ratio > 1) == row.higher_is_better else "B better"
        lines.append(f"{row.metric:14}{row.a:12.2f}{row.b:12.2f}{row.ratio:8.2f}   {row.least:.2f}-{row.most:.2f}  {better}".rstrip())
    reports = [report for one in comparison.rounds for report in (one.a, one.b)]
    failed = sum(report.requests - report.completed for report in reports)
    if failed:
        lines.append(f"errors: {failed} of {sum(report.requests for report in reports)} requests failed")
    for note in dict.fromkeys(f"note: {report.url}: {note}" for report in reports for note in report.notes):
        lines.append(note)
    return "\n".join(lines)
