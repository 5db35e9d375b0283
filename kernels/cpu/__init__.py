"""The native backend for CPUs: C++ behind the op table, for weights as they are stored.

`src/` has one op a file, compiled for each instruction set and chosen when the extension is loaded. `packed.py` packs weights when
a model is loaded for the first time, into memory in huge pages (`memory.py`), and `store.py` keeps them; `recorder.py` puts the model's
ops on a tape (`tape.py`) that a step replays in one call, on threads of its own; `sampling.py` has the same threads choose the tokens.
"""

import hashlib
import logging
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from headrace.kernels.drafts import DraftTrees, Verified, walk
from headrace.kernels.kv_rows import KVRows
from headrace.kernels.ops import HeadShape, Model, RopeTable, Sampled, SamplingBatch
from headrace.kernels.room import host_room
from headrace.kernels.weights import Weight

try:
    from headrace.kernels.cpu import _native
except ImportError as error:
    raise ImportError(f"the extension headrace.kernels.cpu._native is not there: {error}") from None

from headrace.kernels.cpu import moves, sampling
from headrace.kernels.cpu.memory import Memory
from headrace.kernels.cpu.packed import FORMAT, Allocate, Packed, Part, pack, pack_experts
from headrace.kernels.cpu.pages import TYPES, Pages, page_bytes
from headrace.kernels.cpu.recorder import CpuProgram
from headrace.kernels.cpu.store import PackedStore

INSTRUCTION_SETS: list[str] = _native.instruction_sets()
"""What this machine can run, best first."""

log = logging.getLogger("headrace.kernels")


def physical_cores() -> int:
    """Cores that this process may use, hyper-threads not counted."""
    allowed = os.sched_getaffinity(0)
    cores = set()
    for cpu in allowed:
        try:
            with open(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") as file:  # noqa: PTH123
                cores.add(file.read())
        except OSError:
            return len(allowed)
    return len(cores)


def is_stale() -> bool:
    """Whether the extension was built from other sources than those that lie beside this file. False where none do, as in a wheel."""
    sources = sorted(path for path in (Path(__file__).parent / "src").glob("*") if path.suffix in (".cpp", ".h"))
    hashes = "".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in sources)
    return bool(sources) and hashlib.sha256(hashes.encode()).hexdigest() != getattr(_native, "SOURCES", "")


class CpuBackend:
    """`headrace.kernels.ops.Backend` in native code, whose docstrings hold here. `threads` None is one a physical core.

    `isa` is one of INSTRUCTION_SETS; None is what HEADRACE_CPU_ISA names, or the best. ValueError when the machine lacks it, and for
    weights of the wrong type or shape. `activations` is what weights are multiplied with where they allow it: "f32", "int8", "bf16" or
    "auto", which is bf16 for weights that are so or float8 where there are tiles for it, and int8 for others.
    """

    name = "cpu"
    kv_types = tuple(TYPES)
    step_tokens = 256

    def __init__(self, threads: int | None = None, isa: str | None = None, activations: str = "f32") -> None:
        cores = physical_cores()
        if threads is not None and threads < 1:
            raise ValueError(f"threads={threads}: ask for at least 1")
        if threads is not None and threads > cores:
            log.warning("%d threads on %d cores get in each other's way: --threads %d is faster", threads, cores, cores)
        if is_stale():
            log.warning("the native kernels were built from older sources (%s): build them anew with scripts/test", _native.__file__)
        if INSTRUCTION_SETS == ["portable"] and platform.machine() in ("x86_64", "AMD64"):
            log.warning("this CPU has no AVX2 (with FMA and F16C): the portable kernels serve, which are several times slower")
        self._engine = _native.Engine(threads or cores, isa or os.environ.get("HEADRACE_CPU_ISA", ""))
        self._activations = activations
        self._packed: dict[str, Packed] = {}
        self._memory = Memory()
        self._store: PackedStore | None = None
        self.isa: str = self._engine.isa
        self.threads: int = self._engine.threads

    def keep(self, folder: Path, version: str) -> None:
        self._store = PackedStore(folder / f"{version}-{FORMAT}.packed")

    def prepare(self, name: str, weights: Callable[[], Sequence[Weight]], bias: np.ndarray | None = None) -> Packed:
        return self._prepared(name, lambda allocate: pack(self._engine, weights(), allocate), bias)

    def prepare_experts(self, name: str, experts: int, weights: Callable[[], Sequence[Sequence[Weight]]]) -> Packed:
        return self._prepared(name, lambda allocate: pack_experts(self._engine, experts, weights(), allocate))

    def _prepared(self, name: str, make: Callable[[Allocate], list[tuple[Part, np.ndarray]]], bias: np.ndarray | None = None) -> Packed:
        if name not in self._packed:
            parts = self._parts(name, make)
            self._packed[name] = Packed(parts, bias, [self._activations_for(part) for part, _ in parts])
        return self._packed[name]

    def _activations_for(self, part: Part) -> str:
        """What this part is multiplied with."""
        wanted = self._activations
        if wanted == "auto":
            wanted = "bf16" if part.fits_bf16 and self.isa == "amx" else "int8"
        return wanted if part.takes(wanted) else "f32"

    def _parts(self, name: str, make: Callable[[Allocate], list[tuple[Part, np.ndarray]]]) -> Sequence[tuple[Part, np.ndarray]]:
        """The packed weight: from the store if it is there, else made, and left there."""
        parts = self._store.get(name) if self._store else None
        if parts is None:
            parts = make(self._memory.allocate)
            if self._store:
                self._store.add(name, parts)
        return parts

    def prepare_table(self, name: str, weight: Callable[[], Weight]) -> Packed:
        return self.prepare(name, lambda: [weight()])

    def prepare_vector(self, values: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(values, np.float32)

    def prepare_rope(self, table: RopeTable) -> RopeTable:
        cos, sin = (np.ascontiguousarray(values, np.float32) for values in (table.cos, table.sin))
        if cos.ndim != 2 or cos.shape != sin.shape:
            raise ValueError(f"cos {cos.shape} and sin {sin.shape} must be matrices of the same shape")
        return RopeTable(cos, sin, table.interleaved)

    def new_kv(self, layers: int, pages: int, page_size: int, heads: HeadShape, dtype: str = "f32") -> list[Pages]:
        return Pages.new(layers, pages, page_size, heads, dtype)

    def page_bytes(self, layers: int, page_size: int, heads: HeadShape, dtype: str = "f32") -> int:
        return page_bytes(layers, page_size, heads, dtype)

    def copy_kv(self, kv: Sequence[Pages], from_slots: np.ndarray, to_slots: np.ndarray) -> None:
        moves.copy_kv(kv, from_slots, to_slots)

    def gather_kv(self, kv: Sequence[Pages], pages: np.ndarray) -> KVRows:
        return moves.gather_kv(kv, pages)

    def scatter_kv(self, kv: Sequence[Pages], pages: np.ndarray, rows: KVRows) -> None:
        moves.scatter_kv(kv, pages, rows)

    def kv_room(self) -> int:
        return host_room()

    def compile(self, model: Model, kv: Sequence[Pages]) -> CpuProgram:
        if self._store is not None:
            self._store.publish()
        return CpuProgram(self._engine, model, kv)

    def probe(self) -> tuple[float, float, float, float]:
        """The most that this machine does with these threads, by measurement: operations on float32, on int8 and on bfloat16, and
        bytes read from memory, a second. Multiplications and additions count one each."""
        return self._engine.probe()

    def sample(self, logits: np.ndarray, batch: SamplingBatch) -> Sampled:
        return sampling.sample(self._engine, logits, batch)

    def score(self, logits: np.ndarray, tokens: Sequence[int], top: int) -> list[tuple[float, list[int], list[float]]]:
        return sampling.score(self._engine, logits, tokens, top)

    def verify(self, trees: DraftTrees, tokens: Sequence[int] | np.ndarray) -> Verified:
        return walk(trees, tokens.tolist() if isinstance(tokens, np.ndarray) else tokens)

    def rejection_sample(self, logits: np.ndarray, batch: SamplingBatch, trees: DraftTrees, probabilities: np.ndarray) -> Verified:
        """By the reference, which brings torch along: a process that never asks for it is spared that."""
        import torch

        from headrace.kernels.reference.rejection import rejection_sample

        return rejection_sample(torch.from_numpy(logits), batch, trees, torch.from_numpy(probabilities))
