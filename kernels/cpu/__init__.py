"""The native ops for CPUs: C++ behind the op table, for float32 activations and weights as they are stored.

Weights are packed once, when a model is loaded; `src/` has one op a file, compiled for each instruction set and chosen when the
extension is loaded. Here is what stands before them: shapes and types are checked, results are allocated, pointers are taken. What has
no native form (sampling, odd head sizes) runs on the reference ops, which work on the same tensors.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from headrace.kernels.ops import Extents, HeadShape, KVPages, RopeTable, Sampled, SamplingBatch
from headrace.kernels.reference import ReferenceOps
from headrace.kernels.weights import Dense, GroupedInt, Weight

try:
    from headrace.kernels.cpu import _native
except ImportError as error:
    raise ImportError(f"the extension headrace.kernels.cpu._native is not there: {error}") from None

PANEL: int = _native.PANEL
INSTRUCTION_SETS: list[str] = _native.instruction_sets()
"""What this machine can run, best first."""

_FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_INT8, _INT4 = 3, 4
_LANES = 8
_WIDEST_HEAD = 1024
_MOST_SHARED = 64
"""Query heads that may share a KV head."""


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A linear layer's weight in panels of 16 outputs, interleaved by input (`src/ops.h` has the layout)."""

    form: int
    outputs: int
    inputs: int
    group: int
    offset: int
    values: torch.Tensor
    scales: torch.Tensor | None
    minimums: torch.Tensor | None
    bias: torch.Tensor | None


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


class CpuOps:
    """`headrace.kernels.ops.Ops` in native code, whose docstrings hold here. `threads` None is one a physical core.

    HEADRACE_CPU_ISA names a lesser instruction set of INSTRUCTION_SETS to use. ValueError when the machine lacks it.
    """

    name = "cpu"

    def __init__(self, threads: int | None = None) -> None:
        self._engine = _native.Engine(threads or physical_cores(), os.environ.get("HEADRACE_CPU_ISA", ""))
        self._reference = ReferenceOps("cpu")
        self.isa: str = self._engine.isa
        self.threads: int = self._engine.threads

    def prepare(self, weights: Sequence[Weight], bias: torch.Tensor | None = None) -> PackedLinear:
        inputs = weights[0].shape[1]
        outputs = sum(weight.shape[0] for weight in weights)
        for weight in weights:
            if weight.shape[1] != inputs:
                raise ValueError(f"weights of {weight.shape[1]} and {inputs} inputs cannot be stacked")
        if bias is not None:
            bias = _floats("bias", bias.float().contiguous(), (outputs,))
        integers = [weight for weight in weights if isinstance(weight, GroupedInt)]
        if len(integers) == len(weights) and len({(one.group, one.minimums is None) for one in integers}) == 1:
            return self._pack_integers(integers, outputs, inputs, bias)
        dense = [weight.values if isinstance(weight, Dense) else weight.dequantize() for weight in weights]
        kinds = {values.dtype for values in dense}
        if len(kinds) > 1:
            dense = [values.float() for values in dense]
        values = dense[0].contiguous() if len(dense) == 1 else torch.cat(dense)
        packed = torch.empty(_panels(outputs), inputs, PANEL, dtype=values.dtype)
        self._engine.pack(values.data_ptr(), outputs, inputs, values.element_size(), packed.data_ptr())
        return PackedLinear(_FLOATS[values.dtype], outputs, inputs, inputs, 0, packed, None, None, bias)

    def _pack_integers(self, weights: list[GroupedInt], outputs: int, inputs: int, bias: torch.Tensor | None) -> PackedLinear:
        group = weights[0].group
        codes = weights[0].codes.contiguous() if len(weights) == 1 else torch.cat([weight.codes for weight in weights])
        scales = self._pack_floats([weight.scales for weight in weights], outputs)
        minimums = None if weights[0].minimums is None else self._pack_floats([weight.minimums for weight in weights], outputs)
        if all(weight.bits == 4 for weight in weights) and group % 2 == 0:
            offset = 8 if int(codes.min()) < 0 else 0
            packed = torch.empty(_panels(outputs), inputs // 2, PANEL, dtype=torch.uint8)
            self._engine.pack_nibbles(codes.data_ptr(), outputs, inputs, offset, packed.data_ptr())
            return PackedLinear(_INT4, outputs, inputs, group, offset, packed, scales, minimums, bias)
        packed = torch.empty(_panels(outputs), inputs, PANEL, dtype=torch.int8)
        self._engine.pack(codes.data_ptr(), outputs, inputs, 1, packed.data_ptr())
        return PackedLinear(_INT8, outputs, inputs, group, 0, packed, scales, minimums, bias)

    def _pack_floats(self, parts: list[torch.Tensor | None], outputs: int) -> torch.Tensor:
        """Scales or minimums [N, groups] as panels."""
        values = torch.cat([part for part in parts if part is not None])
        packed = torch.empty(_panels(outputs), values.shape[1], PANEL, dtype=torch.float32)
        self._engine.pack(values.data_ptr(), outputs, values.shape[1], 4, packed.data_ptr())
        return packed

    def prepare_table(self, weight: Weight) -> Weight:
        return self._reference.prepare_table(weight)

    def embed(self, ids: torch.Tensor, table: Weight, scale: float = 1.0) -> torch.Tensor:
        return self._reference.embed(ids, table, scale)

    def rmsnorm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        rows, width = _matrix("x", x)
        _floats("weight", weight, (width,))
        y = torch.empty_like(x)
        self._engine.rmsnorm(x.data_ptr(), 0, weight.data_ptr(), eps, rows, width, 0, y.data_ptr())
        return y

    def add_rmsnorm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows, width = _matrix("x", x)
        _floats("residual", residual, x.shape)
        _floats("weight", weight, (width,))
        y, total = torch.empty_like(x), torch.empty_like(x)
        self._engine.rmsnorm(x.data_ptr(), residual.data_ptr(), weight.data_ptr(), eps, rows, width, total.data_ptr(), y.data_ptr())
        return y, total

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self._reference.add(x, residual)

    def linear(self, x: torch.Tensor, weight: PackedLinear) -> torch.Tensor:
        rows, width = _matrix("x", x)
        if width != weight.inputs:
            raise ValueError(f"x has {width} columns, the weight has {weight.inputs} inputs")
        y = torch.empty(rows, weight.outputs)
        if rows:
            self._engine.linear(
                weight.form,
                weight.outputs,
                weight.inputs,
                weight.group,
                weight.offset,
                weight.values.data_ptr(),
                weight.scales.data_ptr() if weight.scales is not None else 0,
                weight.minimums.data_ptr() if weight.minimums is not None else 0,
                weight.bias.data_ptr() if weight.bias is not None else 0,
                x.data_ptr(),
                rows,
                y.data_ptr(),
            )
        return y

    def gated(self, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
        rows, width = _matrix("gate_up", gate_up)
        if activation not in ("silu", "gelu_tanh"):
            raise ValueError(f"activation {activation!r} is not known: use silu or gelu_tanh")
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
        _pages(kv, heads)
        _indices("positions", extents.positions, tokens)
        _indices("slots", extents.slots, tokens)
        for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
            if norm is not None:
                _floats(name, norm, (dim,))
        q = torch.empty(tokens, heads.query_heads * dim)
        self._engine.rope_write_kv(
            qkv.data_ptr(),
            rope.cos.data_ptr(),
            rope.sin.data_ptr(),
            q_norm.data_ptr() if q_norm is not None else 0,
            k_norm.data_ptr() if k_norm is not None else 0,
            extents.positions.data_ptr(),
            extents.slots.data_ptr(),
            kv.keys.data_ptr(),
            kv.values.data_ptr(),
            q.data_ptr(),
            tokens,
            heads.query_heads,
            heads.kv_heads,
            dim,
            rope.cos.shape[1],
            kv.keys.shape[2],
            rope.interleaved,
            eps,
        )
        return q

    def attention(
        self, q: torch.Tensor, heads: HeadShape, kv: KVPages, extents: Extents, scale: float, window: int | None
    ) -> torch.Tensor:
        tokens, _ = _matrix("q", q)
        page_size = kv.keys.shape[2]
        if heads.dim % _LANES or page_size % _LANES or heads.query_heads // heads.kv_heads > _MOST_SHARED:
            return self._reference.attention(q, heads, kv, extents, scale, window)
        _floats("q", q, (tokens, heads.query_heads * heads.dim))
        _pages(kv, heads)
        _indices("positions", extents.positions, tokens)
        requests, width = extents.pages.shape
        _indices("query_start", extents.query_start, requests + 1)
        out = torch.empty_like(q)
        self._engine.attention(
            q.data_ptr(),
            kv.keys.data_ptr(),
            kv.values.data_ptr(),
            extents.positions.data_ptr(),
            extents.query_start.data_ptr(),
            extents.pages.data_ptr(),
            out.data_ptr(),
            requests,
            width,
            heads.query_heads,
            heads.kv_heads,
            heads.dim,
            page_size,
            window or 0,
            scale,
        )
        return out

    def rows(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return self._reference.rows(x, index)

    def sample(self, logits: torch.Tensor, batch: SamplingBatch) -> Sampled:
        return self._reference.sample(logits, batch)

    def score(self, logits: torch.Tensor, tokens: Sequence[int], top: int) -> list[tuple[float, list[int], list[float]]]:
        return self._reference.score(logits, tokens, top)


def _panels(outputs: int) -> int:
    return -(-outputs // PANEL)


def _matrix(name: str, x: torch.Tensor) -> tuple[int, int]:
    """The shape of a contiguous float32 matrix. Raises `ValueError` for anything else."""
    if x.dtype is not torch.float32 or x.dim() != 2 or not x.is_contiguous():
        raise ValueError(f"{name} must be a contiguous float32 matrix, it is {x.dtype} {tuple(x.shape)}")
    return x.shape[0], x.shape[1]


def _floats(name: str, x: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    if x.dtype is not torch.float32 or x.shape != tuple(shape) or not x.is_contiguous():
        raise ValueError(f"{name} must be contiguous float32 {tuple(shape)}, it is {x.dtype} {tuple(x.shape)}")
    return x


def _indices(name: str, x: torch.Tensor, count: int) -> None:
    if x.dtype is not torch.int32 or x.shape != (count,) or not x.is_contiguous():
        raise ValueError(f"{name} must be contiguous int32 [{count}], it is {x.dtype} {tuple(x.shape)}")


def _pages(kv: KVPages, heads: HeadShape) -> None:
    for name, x in (("keys", kv.keys), ("values", kv.values)):
        if x.dtype is not torch.float32 or x.dim() != 4 or x.shape[1] != heads.kv_heads or x.shape[3] != heads.dim or not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous float32 [pages, {heads.kv_heads}, page_size, {heads.dim}], not {tuple(x.shape)}")
