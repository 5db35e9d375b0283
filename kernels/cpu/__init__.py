"""The native ops for CPUs: C++ behind the op table, for float32 activations and weights as they are stored.

`src/` has one op a file, compiled for each instruction set and chosen when the extension is loaded. `packed.py` packs weights when
a model is loaded. Here is what stands before the kernels in a step: types and shapes are checked, results are allocated, pointers are
taken. What does not change from call to call (weights, pages, a batch's arrays) is looked at once. Sampling, and heads whose size is no
multiple of 8, run on the reference ops, which work on the same tensors.
"""

import hashlib
import logging
import os
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch

from headrace.kernels.ops import Extents, HeadShape, KVPages, RopeTable, Sampled, SamplingBatch
from headrace.kernels.reference import ReferenceOps
from headrace.kernels.weights import GroupedInt, Weight

try:
    from headrace.kernels.cpu import _native
except ImportError as error:
    raise ImportError(f"the extension headrace.kernels.cpu._native is not there: {error}") from None

from headrace.kernels.cpu.packed import Packed, pack

INSTRUCTION_SETS: list[str] = _native.instruction_sets()
"""What this machine can run, best first."""

_LANES = 8
_WIDEST_HEAD = 1024
_MOST_KNOWN = 4096
"""Tensors that are remembered as checked; beyond, all are looked at anew."""

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


class CpuOps:
    """`headrace.kernels.ops.Ops` in native code, whose docstrings hold here. `threads` None is one a physical core.

    `isa` is one of INSTRUCTION_SETS; None is what HEADRACE_CPU_ISA names, or the best. ValueError when the machine lacks it, and from
    every op for a tensor of the wrong type or shape, or an index out of bounds.
    """

    name = "cpu"

    def __init__(self, threads: int | None = None, isa: str | None = None) -> None:
        cores = physical_cores()
        if threads is not None and threads < 1:
            raise ValueError(f"threads={threads}: ask for at least 1")
        if threads is not None and threads > cores:
            log.warning("%d threads on %d cores get in each other's way: --threads %d is faster", threads, cores, cores)
        if is_stale():
            log.warning("the native kernels were built from older sources (%s): build them anew with scripts/test", _native.__file__)
        self._engine = _native.Engine(threads or cores, isa or os.environ.get("HEADRACE_CPU_ISA", ""))
        self._reference = ReferenceOps("cpu")
        self._vectors: dict[int, tuple[weakref.ref[torch.Tensor], int, int]] = {}
        self._pages: dict[int, tuple[weakref.ref[torch.Tensor], weakref.ref[torch.Tensor], _native.KV]] = {}
        self._tables: list[tuple[list[weakref.ref[torch.Tensor]], int, Packed]] = []
        self._batch: tuple[Extents, int, _native.Batch] | None = None
        self._rope: tuple[RopeTable, int, tuple[int, int, int, int]] | None = None
        self._heads: dict[HeadShape, _native.Heads] = {}
        self.isa: str = self._engine.isa
        self.threads: int = self._engine.threads

    def prepare(self, weights: Sequence[Weight], bias: torch.Tensor | None = None) -> Packed:
        if bias is None and len(weights) == 1 and (known := self._known_table(weights[0])):
            return known
        return pack(self._engine, weights, bias)

    def prepare_table(self, weight: Weight) -> Packed:
        if known := self._known_table(weight):
            return known
        packed = pack(self._engine, [weight])
        parts, group = _parts(weight)
        self._tables.append(([weakref.ref(part) for part in parts], group, packed))
        return packed

    def _known_table(self, weight: Weight) -> Packed | None:
        """The table made of the very same weight, while that is alive."""
        self._tables = [table for table in self._tables if all(part() is not None for part in table[0])]
        parts, group = _parts(weight)
        for known, known_group, packed in self._tables:
            if known_group == group and len(known) == len(parts) and all(a() is b for a, b in zip(known, parts, strict=True)):
                return packed
        return None

    def embed(self, ids: torch.Tensor, table: Packed, scale: float = 1.0) -> torch.Tensor:
        (count,) = _indices("ids", ids)
        y = torch.empty(count, table.inputs)
        self._engine.embed(table.native, ids.data_ptr(), count, scale, y.data_ptr())
        return y

    def rmsnorm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        rows, width = _matrix("x", x)
        address = self._vector("weight", weight, width)
        y = torch.empty(rows, width)
        self._engine.rmsnorm(x.data_ptr(), 0, address, eps, rows, width, 0, y.data_ptr())
        return y

    def add_rmsnorm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        rows, width = shape = _matrix("x", x)
        if _matrix("residual", residual) != shape:
            raise ValueError(f"residual has shape {tuple(residual.shape)}, x has {tuple(shape)}")
        address = self._vector("weight", weight, width)
        y, total = torch.empty(rows, width), torch.empty(rows, width)
        self._engine.rmsnorm(x.data_ptr(), residual.data_ptr(), address, eps, rows, width, total.data_ptr(), y.data_ptr())
        return y, total

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        rows, width = shape = _matrix("x", x)
        if _matrix("residual", residual) != shape:
            raise ValueError(f"residual has shape {tuple(residual.shape)}, x has {tuple(shape)}")
        total = torch.empty(rows, width)
        self._engine.add(x.data_ptr(), residual.data_ptr(), rows * width, total.data_ptr())
        return total

    def linear(self, x: torch.Tensor, weight: Packed) -> torch.Tensor:
        rows, width = _matrix("x", x)
        if width != weight.inputs:
            raise ValueError(f"x has {width} columns, the weight has {weight.inputs} inputs")
        y = torch.empty(rows, weight.outputs)
        self._engine.linear(weight.native, x.data_ptr(), rows, y.data_ptr())
        return y

    def gated(self, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
        rows, width = _matrix("gate_up", gate_up)
        if activation not in ("silu", "gelu_tanh"):
            raise ValueError(f'activation "{activation}" is not known: use "silu" or "gelu_tanh"')
        if width % 2:
            raise ValueError(f"gate_up has {width} columns, it must have two equal halves")
        y = torch.empty(rows, width // 2)
        self._engine.gated(gate_up.data_ptr(), rows, width // 2, activation == "gelu_tanh", y.data_ptr())
        return y

    def rope_write_kv(
        self,
        qkv: torch.Tensor,
        heads: HeadShape,
        rope: RopeTable,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        eps: float,
        kv: KVPages,
        extents: Extents,
    ) -> torch.Tensor:
        tokens, width = _matrix("qkv", qkv)
        dim = heads.dim
        if width != (heads.query_heads + 2 * heads.kv_heads) * dim:
            raise ValueError(f"qkv has {width} columns, {heads} needs {(heads.query_heads + 2 * heads.kv_heads) * dim}")
        if dim > _WIDEST_HEAD:
            return self._reference.rope_write_kv(qkv, heads, rope, q_norm, k_norm, eps, kv, extents)
        cos, sin, positions, half = self._rope_addresses(rope, dim)
        q = torch.empty(tokens, heads.query_heads * dim)
        self._engine.rope_write_kv(
            qkv.data_ptr(),
            self._native_heads(heads),
            cos,
            sin,
            positions,
            half,
            rope.interleaved,
            0 if q_norm is None else self._vector("q_norm", q_norm, dim),
            0 if k_norm is None else self._vector("k_norm", k_norm, dim),
            eps,
            self._native_pages(kv, heads),
            self._native_batch(extents, tokens),
            q.data_ptr(),
        )
        return q

    def attention(self, q: torch.Tensor, heads: HeadShape, kv: KVPages, extents: Extents, scale: float, window: int | None) -> torch.Tensor:
        if heads.dim % _LANES:
            return self._reference.attention(q, heads, kv, extents, scale, window)
        tokens, width = _matrix("q", q)
        if width != heads.query_heads * heads.dim:
            raise ValueError(f"q has {width} columns, {heads} needs {heads.query_heads * heads.dim}")
        if window is not None and window < 1:
            raise ValueError(f"window={window}: a token sees at least itself")
        native, pages, batch = self._native_heads(heads), self._native_pages(kv, heads), self._native_batch(extents, tokens)
        out = torch.empty(tokens, width)
        self._engine.attention(q.data_ptr(), native, pages, batch, scale, window or 0, out.data_ptr())
        return out

    def rows(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        total, width = _matrix("x", x)
        (count,) = _indices("index", index)
        y = torch.empty(count, width)
        self._engine.rows(x.data_ptr(), index.data_ptr(), count, total, width, y.data_ptr())
        return y

    def sample(self, logits: torch.Tensor, batch: SamplingBatch) -> Sampled:
        return self._reference.sample(logits, batch)

    def score(self, logits: torch.Tensor, tokens: Sequence[int], top: int) -> list[tuple[float, list[int], list[float]]]:
        return self._reference.score(logits, tokens, top)

    def _vector(self, name: str, x: torch.Tensor, size: int) -> int:
        """The address of a contiguous float32 [size]."""
        known = self._vectors.get(id(x))
        if known is not None and known[0]() is x and known[1] == size:
            return known[2]
        if x.dtype is not torch.float32 or x.shape != (size,) or not x.is_contiguous() or not x.is_cpu:
            raise ValueError(f"{name} must be contiguous float32 [{size}] on the CPU, it is {_words(x)}")
        if len(self._vectors) >= _MOST_KNOWN:
            self._vectors.clear()
        self._vectors[id(x)] = (weakref.ref(x), size, x.data_ptr())
        return x.data_ptr()

    def _rope_addresses(self, rope: RopeTable, dim: int) -> tuple[int, int, int, int]:
        """Addresses of cos and sin, positions and pairs. Layers that follow each other mostly share a table: it is looked at once."""
        if self._rope is not None and self._rope[0] is rope and self._rope[1] == dim:
            return self._rope[2]
        positions, half = _matrix("cos", rope.cos)
        if _matrix("sin", rope.sin) != rope.cos.shape or 2 * half > dim:
            raise ValueError(f"cos {tuple(rope.cos.shape)} and sin {tuple(rope.sin.shape)} do not fit heads of {dim}")
        addresses = rope.cos.data_ptr(), rope.sin.data_ptr(), positions, half
        self._rope = (rope, dim, addresses)
        return addresses

    def _native_heads(self, heads: HeadShape) -> _native.Heads:
        native = self._heads.get(heads)
        if native is None:
            if min(heads.query_heads, heads.kv_heads, heads.dim) < 1 or heads.query_heads % heads.kv_heads:
                raise ValueError(f"{heads}: query heads must share KV heads evenly")
            native = self._heads[heads] = _native.Heads(heads.query_heads, heads.kv_heads, heads.dim)
        return native

    def _native_pages(self, kv: KVPages, heads: HeadShape) -> _native.KV:
        keys, values = kv.keys, kv.values
        known = self._pages.get(id(keys))
        if (
            known is not None
            and known[0]() is keys
            and known[1]() is values
            and keys.shape[1] == heads.kv_heads
            and keys.shape[3] == heads.dim
        ):
            return known[2]
        for name, x in (("keys", keys), ("values", values)):
            fits = x.dim() == 4 and x.shape[1] == heads.kv_heads and x.shape[2] > 0 and x.shape[3] == heads.dim and x.shape == keys.shape
            if x.dtype is not torch.float32 or not fits or not x.is_contiguous() or not x.is_cpu:
                wanted = f"[pages, {heads.kv_heads}, page_size, {heads.dim}]"
                raise ValueError(f"{name} must be contiguous float32 {wanted} on the CPU, it is {_words(x)}")
        if len(self._pages) >= _MOST_KNOWN:
            self._pages.clear()
        native = _native.KV(keys.data_ptr(), values.data_ptr(), keys.shape[0], keys.shape[2])
        self._pages[id(keys)] = (weakref.ref(keys), weakref.ref(values), native)
        return native

    def _native_batch(self, extents: Extents, tokens: int) -> _native.Batch:
        """All layers of a step share one batch: it is looked at once."""
        if self._batch is not None and self._batch[0] is extents and self._batch[1] == tokens:
            return self._batch[2]
        requests, width = _indices("pages", extents.pages, 2)
        for name, x, count in (
            ("positions", extents.positions, tokens),
            ("slots", extents.slots, tokens),
            ("query_start", extents.query_start, requests + 1),
            ("context", extents.context, requests),
        ):
            if _indices(name, x) != (count,):
                raise ValueError(f"{name} must have {count} entries, it has {x.shape[0]}")
        positions, slots, starts, pages = extents.positions, extents.slots, extents.query_start, extents.pages
        native = _native.Batch(positions.data_ptr(), slots.data_ptr(), starts.data_ptr(), pages.data_ptr(), tokens, requests, width)
        self._batch = (extents, tokens, native)
        return native


def _parts(weight: Weight) -> tuple[list[torch.Tensor], int]:
    """The tensors that make a weight, and their group: two weights of the same ones are the same."""
    if isinstance(weight, GroupedInt):
        return [part for part in (weight.codes, weight.scales, weight.minimums) if part is not None], weight.group
    return [weight.values], 0


def _matrix(name: str, x: torch.Tensor) -> torch.Size:
    """The shape of a contiguous float32 matrix. Raises `ValueError` for anything else."""
    if x.dtype is not torch.float32 or x.dim() != 2 or not x.is_contiguous() or not x.is_cpu:
        raise ValueError(f"{name} must be a contiguous float32 matrix on the CPU, it is {_words(x)}")
    return x.shape


def _indices(name: str, x: torch.Tensor, dimensions: int = 1) -> torch.Size:
    if x.dtype is not torch.int32 or x.dim() != dimensions or not x.is_contiguous() or not x.is_cpu:
        raise ValueError(f"{name} must be contiguous int32 of {dimensions} dimensions on the CPU, it is {_words(x)}")
    return x.shape


def _words(x: torch.Tensor) -> str:
    return f"{x.dtype} {list(x.shape)} on {x.device}"
