"""`headrace bench kernels`: every op of a model's step, timed where it runs, beside the measured peaks of the machine.

    model ─▶ tape ─▶ steps of each size ─▶ time of each op ─▶ GOPS and GB/s, and their share of the peaks

Steps of few rows are decodes, a request each; those of many are chunks of one prompt. Ops of the same shape are taken together. What a
shared machine can do changes from one second to the next, so its peaks are measured anew before every run, and all figures are medians.
"""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from headrace.engine.checkpoint.resolve import resolve
from headrace.engine.config import Config
from headrace.engine.errors import UserError
from headrace.kernels.ops import Batch
from headrace.workers.cache import weights_folder, weights_version
from headrace.workers.loader import open_checkpoint
from headrace.workers.model.decoder import load_decoder

DESCRIPTION = "Time every op at a model's shapes, beside what this machine can do at most."
DECODES = (1, 4, 16, 64)
CHUNKS = (64, 256)
RUNS = 7
SETTINGS = ("model", "revision", "threads", "activations", "kv_dtype", "page_size")
"""Those that matter here."""


class Timing(msgspec.Struct, frozen=True):
    """The ops of one shape in one step, all layers together. Rates are a second."""

    op: str
    shape: str
    rows: int
    decode: bool
    """A request a row, or all rows a chunk of one."""
    calls: int
    us: float
    """Of all calls."""
    operations: float
    """Multiplications and additions, of all calls."""
    numbers: str
    of_peak: float
    """The share of `operations` a second in the most that the machine did on these numbers just before."""
    bytes: float
    """Read and written at least, of all calls."""
    of_memory: float
    """The same for `bytes`."""


class Peaks(msgspec.Struct, frozen=True):
    """Most a second, of all threads."""

    float_operations: float
    int8_operations: float
    bf16_operations: float
    bytes_read: float

    def of(self, numbers: str) -> float:
        """Operations on these numbers."""
        return {"f32": self.float_operations, "int8": self.int8_operations, "bf16": self.bf16_operations}[numbers]


class Report(msgspec.Struct, frozen=True):
    model: str
    kernels: str
    threads: int
    context: int
    peaks: Peaks
    timings: list[Timing]


@dataclass(frozen=True, slots=True)
class Step:
    rows: int
    decode: bool

    @property
    def requests(self) -> int:
        return self.rows if self.decode else 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is no setting."""
    parser.add_argument("--context", type=int, default=512, metavar="TOKENS", help="positions that rows see (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")


def run(config: Config, arguments: argparse.Namespace) -> int:
    """The exit status. Raises `UserError`."""
    report = measure(config, arguments.context)
    print(table(report))
    if arguments.json:
        arguments.json.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    return 0


def measure(config: Config, context: int) -> Report:
    """Time all ops. Raises `UserError`, also where the native kernels cannot run."""
    try:
        from headrace.kernels.cpu import CpuBackend
    except ImportError as error:
        raise UserError(f"{error}: only the native kernels are timed") from None
    model = resolve(config)
    steps = [Step(rows, True) for rows in DECODES] + [Step(rows, False) for rows in CHUNKS]
    if not max(CHUNKS) <= context <= model.context:
        raise UserError(f"--context {context}: the model allows {max(CHUNKS)} to {model.context}")
    backend = CpuBackend(config.threads, activations=config.activations)
    checkpoint = open_checkpoint(model)
    backend.keep(weights_folder(checkpoint), weights_version(checkpoint))
    decoder = load_decoder(model.architecture, checkpoint, backend, context)
    pages = -(-context // config.page_size)
    most = max(step.requests for step in steps)
    kv = backend.new_kv(len(decoder.layers), pages * most, config.page_size, decoder.heads, config.kv_dtype)
    program = backend.compile(decoder, kv)
    timings, peaks = [], []
    for step in steps:
        batch, picks = _batch(step, context, pages, config.page_size, model.vocab_size)
        program.run(batch, picks)
        program.times()
        runs = []
        for _ in range(RUNS):
            peaks.append(backend.probe())
            program.run(batch, picks)
            runs.append(program.times())
        spent = np.array([[spent for _, spent in one] for one in runs])
        timings += _timings(step, batch, [work for work, _ in runs[0]], spent, [Peaks(*peak) for peak in peaks[-RUNS:]])
    return Report(model.name, backend.isa, backend.threads, context, Peaks(*np.median(peaks, 0).tolist()), timings)


def _batch(step: Step, context: int, pages: int, page_size: int, vocabulary: int) -> tuple[Batch, np.ndarray]:
    """Rows that end at `context`, each request in pages of its own; every request picks its last."""
    count, requests = step.rows // step.requests, step.requests
    positions = np.tile(np.arange(context - count, context, dtype=np.int32), requests)
    table = np.arange(requests * pages, dtype=np.int32).reshape(requests, pages)
    owner = np.repeat(np.arange(requests), count)
    slots = (table[owner, positions // page_size] * page_size + positions % page_size).astype(np.int32)
    ids = np.random.default_rng(0).integers(0, vocabulary, step.rows, dtype=np.int32)
    starts = np.arange(0, step.rows + 1, count, dtype=np.int32)
    return Batch(ids, positions, slots, starts, table), starts[1:] - np.int32(1)


def _timings(step: Step, batch: Batch, works: Sequence, spent: np.ndarray, peaks: Sequence[Peaks]) -> Iterable[Timing]:
    """`spent` is nanoseconds [runs, ops], `peaks` are those of each run."""
    seen = int((batch.positions + 1).sum())
    kept = int((batch.positions[batch.query_start[1:] - 1] + 1).sum())
    alike: dict[tuple[str, str, int], list[int]] = {}
    for index, work in enumerate(works):
        alike.setdefault((work.op, work.shape, step.requests if work.picked else step.rows), []).append(index)
    for (op, shape, rows), indices in alike.items():
        work, calls = works[indices[0]], len(indices)
        seconds = spent[:, indices].sum(1) / 1e9
        operations = calls * (work.row_operations * rows + work.position_operations * seen)
        moved = calls * (work.fixed_bytes + work.row_bytes * rows + work.position_bytes * kept)
        yield Timing(
            op=op,
            shape=shape,
            rows=rows,
            decode=step.decode,
            calls=calls,
            us=float(np.median(seconds)) * 1e6,
            operations=operations,
            numbers=work.numbers,
            of_peak=float(np.median(operations / seconds / [one.of(work.numbers) for one in peaks])),
            bytes=moved,
            of_memory=float(np.median(moved / seconds / [one.bytes_read for one in peaks])),
        )


def table(report: Report) -> str:
    peaks = report.peaks
    lines = [
        f"{report.model}, {report.kernels} kernels, {report.threads} threads, {report.context} positions",
        f"this machine at most: {peaks.float_operations / 1e9:.0f} GOPS on float32, {peaks.int8_operations / 1e9:.0f} on int8, "
        f"{peaks.bf16_operations / 1e9:.0f} on bfloat16, "
        f"{peaks.bytes_read / 1e9:.1f} GB/s from memory (what fits its caches is read faster)",
    ]
    step = None
    for one in report.timings:
        if step != (one.decode, one.rows) and one.op in ("embed", "input"):
            step = (one.decode, one.rows)
            what = f"decode, {one.rows} requests" if one.decode else f"chunk of {one.rows} tokens"
            lines += ["", f"{what:<46}{'calls':>6}{'µs each':>10}{'GOPS':>8}{'of peak':>9}{'GB/s':>8}{'of peak':>9}"]
        seconds = one.us / 1e6
        rate = f"{one.operations / seconds / 1e9:8.1f}{one.of_peak:9.0%}" if one.operations else " " * 17
        flow = f"{one.bytes / seconds / 1e9:8.1f}{one.of_memory:9.0%}"
        lines.append(f"  {one.op + ' ' + one.shape:<44}{one.calls:6}{one.us / one.calls:10.1f}{rate}{flow}")
    return "\n".join(lines)
