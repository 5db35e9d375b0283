#!/usr/bin/env python3
"""Compare Headrace with other engines on this machine: the same model, threads and prompts, in turn, round after round.

    scripts/bench/compare.py MODEL.gguf --peer llama.cpp=/path/to/llama-server [--work a c] [--rounds N] [-- OPTIONS OF headrace serve]

      for each kind of workload (one stream, 32 streams): start every engine
        for each workload:  A B C   A B C   A B C           one measurement each, with fresh prompts a round
      end them; medians over the rounds, and for each peer the median of the rounds' own ratios

A machine's speed moves more from hour to hour than most differences one looks for, so only ratios within a round are worth much, and
each carries what else kept the machine busy. The workloads a, b, c and d are those of `headrace bench`; peers.toml says how engines are
started. One installed peer is enough; `--peer NAME/VARIANT=PROGRAM` with `--peer-model NAME/VARIANT=PATH` has one take part in two forms.
"""

import argparse
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import msgspec
from peers import Chosen, Engine, Measured, Peer, Server, Started, read_peers, running
from processes import parse

from headrace.client.bench.corpus import load_words
from headrace.client.bench.machine import Machine, facts
from headrace.client.bench.options import WORKLOADS, Options
from headrace.client.bench.report import Report
from headrace.engine.errors import UserError

SCHEMA = "headrace-comparison/1"
OURS = "headrace"
FIRST_SEED = 1
BUSY_CORES = 0.15
"""Foreign use of the machine above this, or this share of it stolen, is marked in the table."""
STOLEN_SHARE = 0.02


class Metric(msgspec.Struct, frozen=True):
    """What a workload is about."""

    work: str
    name: str
    unit: str
    higher_is_better: bool

    def of(self, report: Report) -> float | None:
        match self.name:
            case "decode":
                return report.decode_tok_s
            case "TTFT":
                return report.ttft_ms.p50 if report.ttft_ms else None
            case "prefill":
                return report.prompt_tok_s
            case "output":
                return report.output_tok_s
            case _:
                return report.wall_s


METRICS = (
    Metric("a", "decode", "tok/s", True),
    Metric("a", "TTFT", "ms", False),
    Metric("b", "prefill", "tok/s", True),
    Metric("c", "output", "tok/s", True),
    Metric("d", "wall", "s", False),
)


class Taken(msgspec.Struct):
    """One measurement."""

    work: str
    round: int
    engine: str
    measured: Measured


class Line(msgspec.Struct):
    """An engine's figure for one metric over all rounds."""

    metric: Metric
    engine: str
    median: float
    ahead: float | None
    """How many times better Headrace is, median over the rounds; None for Headrace itself."""
    ahead_least: float | None
    ahead_most: float | None
    disturbed: bool
    """In some round something else used the machine."""


class Comparison(msgspec.Struct):
    schema: str
    model: str
    threads: int
    rounds: int
    machine: Machine
    started: list[Started]
    taken: list[Taken]
    lines: list[Line]


def compare(engines: list[Chosen], works: list[str], rounds: int, threads: int) -> Comparison:
    """Measure; the first engine is the one the others are compared with. Raises `UserError`."""
    words = load_words(None)
    done = Comparison(SCHEMA, Path(engines[0].model).name, threads, rounds, facts(), [], [], [])
    for streams in sorted({streams_of(work) for work in works}):
        with ExitStack() as stack:
            started: list[Engine] = []
            for one in engines:
                first = started[0] if started else None
                tokenizer = first.address if isinstance(first, Server) else None
                print(f"starting {one.name} for {streams} streams", file=sys.stderr, flush=True)
                started.append(stack.enter_context(running(one, threads, streams, tokenizer)))
                done.started.append(started[-1].started)
            for work in (work for work in works if streams_of(work) == streams):
                for number in range(1, rounds + 1):
                    for engine in started:
                        label = f"{work} round {number}/{rounds} {engine.started.name}: "
                        options = Options(work=work, seed=FIRST_SEED + number, timeout=3600.0, **WORKLOADS[work])  # type: ignore[arg-type]
                        measured = engine.measure(options, words, label)
                        if measured.report.errors:
                            raise UserError(f"{label}requests failed: {measured.report.errors} {measured.report.error_example or ''}")
                        done.taken.append(Taken(work, number, engine.started.name, measured))
    done.lines = list(lines(done.taken))
    return done


def streams_of(work: str) -> int:
    return WORKLOADS[work]["concurrency"]  # type: ignore[return-value]


def lines(taken: list[Taken]) -> Iterator[Line]:
    """The figures of every metric that was measured, engines in the order they were measured in."""
    for metric in METRICS:
        by_engine: dict[str, dict[int, Measured]] = {}
        for one in taken:
            if one.work == metric.work:
                by_engine.setdefault(one.engine, {})[one.round] = one.measured
        ours: dict[int, float] = {}
        for engine, measured in by_engine.items():
            figures = {number: value for number, one in measured.items() if (value := metric.of(one.report)) is not None}
            if not figures:
                continue
            disturbed = any(is_disturbed(one) for one in measured.values())
            ahead = [ours[number] / value if metric.higher_is_better else value / ours[number] for number, value in figures.items() if ours]
            spread = (median(ahead), min(ahead), max(ahead)) if ahead else (None, None, None)
            yield Line(metric, engine, median(figures.values()), *spread, disturbed)
            ours = ours or figures


def is_disturbed(measured: Measured) -> bool:
    return measured.foreign_cores > BUSY_CORES or measured.report.machine_stolen_share > STOLEN_SHARE


def table(done: Comparison) -> str:
    """For a terminal."""
    width = max(len(line.engine) for line in done.lines) + 2
    rows = [
        f"{done.model}, {done.threads} threads, medians of {done.rounds} rounds; ×: how many times better {OURS} is",
        f"{done.machine.cpu}, {done.machine.cores} cores",
        "",
    ]
    shown: Metric | None = None
    for line in done.lines:
        head = f"{line.metric.work}  {line.metric.name} {line.metric.unit}" if line.metric != shown else ""
        shown = line.metric
        ahead = "" if line.ahead is None else f"{line.ahead:8.2f} ×   ({line.ahead_least:.2f}-{line.ahead_most:.2f})"
        rows.append(f"{head:18}{line.engine:{width}}{line.median:10.2f}{ahead}{'   disturbed' if line.disturbed else ''}")
    rows += ["", f"{'':18}{'':{width}}   start s   peak MiB   version"]
    most: dict[str, Started] = {}
    for one in done.started:
        if one.name not in most or one.peak_rss_mib > most[one.name].peak_rss_mib:
            most[one.name] = one
    rows += [f"{'':18}{one.name:{width}}{one.start_s:10.1f}{one.peak_rss_mib:11.0f}   {one.version}" for one in most.values()]
    notes = (f"note: {one.work} {one.engine}: {note}" for one in done.taken for note in one.measured.report.notes)
    return "\n".join([*rows, *dict.fromkeys(notes)])


def choose(arguments: argparse.Namespace) -> list[Chosen]:
    """Headrace and the chosen peers. Raises `UserError`."""
    known = read_peers([Path(__file__).resolve().parent / "peers.toml", *arguments.peers])
    models = dict(_pairs("--peer-model", arguments.peer_model))
    programs = dict(_pairs("--peer", arguments.peer))
    for name in models.keys() - programs.keys():
        raise UserError(f"--peer-model {name}: there is no --peer {name}")
    chosen = [Chosen(OURS, _entry(known, OURS), sys.executable, str(arguments.model.resolve()), arguments.serve)]
    for name, program in programs.items():
        model = Path(models.get(name, arguments.model)).resolve()
        if not model.exists():
            raise UserError(f"{name}: there is no {model}")
        chosen.append(Chosen(name, _entry(known, name), _found(program), str(model)))
    return chosen


def _pairs(flag: str, given: Iterable[str]) -> Iterator[tuple[str, str]]:
    for text in given:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise UserError(f"{flag} {text}: say NAME=PATH")
        yield name, value


def _entry(known: dict[str, Peer], name: str) -> Peer:
    if (entry := known.get(name.partition("/")[0])) is None:
        raise UserError(f"{name} is in no file of peers: known are {', '.join(sorted(known.keys() - {OURS}))}; add one with --peers FILE")
    return entry


def _found(program: str) -> str:
    """Absolute where it is a path: engines run in a folder of their own. Links stay, as a virtual environment's Python is one."""
    return os.path.abspath(program) if os.sep in program else program  # noqa: PTH100


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare Headrace with other engines on this machine.")
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL.gguf")
    add("--peer", action="append", default=[], metavar="NAME=PROGRAM", help="an entry of peers.toml, and where its program (or Python) is")
    add(
        "--peer-model",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="what a peer serves instead: a conversion of MODEL.gguf",
    )
    add("--peers", action="append", default=[], type=Path, metavar="FILE", help="more entries, as in peers.toml")
    add("--work", nargs="+", choices=sorted(WORKLOADS), default=sorted(WORKLOADS), help="default: all four")
    add("--rounds", type=int, default=3, metavar="N", help="default: 3")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="for every engine (default: all cores)")
    add("--json", type=Path, default=Path("build/bench/compare.json"), help="default: %(default)s")
    arguments = parse(parser)
    try:
        done = compare(choose(arguments), arguments.work, arguments.rounds, arguments.threads)
    except UserError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 1
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_bytes(msgspec.json.format(msgspec.json.encode(done), indent=1) + b"\n")
    print(table(done))
    print(f"saved {arguments.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
