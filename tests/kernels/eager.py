"""Ops on tensors, one at a time, as tests want them: the native backend's each on a tape of its own, the reference's as they are."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count

import numpy as np
import torch

from headrace.kernels.ops import Batch, HeadShape, RopeTable
from headrace.kernels.reference import ReferenceBackend
from headrace.kernels.reference.step import KVPages, StepTokens
from headrace.kernels.weights import Weight
from tests.kernels.paged import Extents


class EagerOps:
    """What both have in common: a backend, and names for weights that are never asked for again."""

    def __init__(self, backend) -> None:
        self.backend = backend
        self._names = (str(number) for number in count())

    def prepare(self, weights: Sequence[Weight], bias: torch.Tensor | None = None):
        return self.backend.prepare(next(self._names), lambda: weights, None if bias is None else bias.numpy())

    def prepare_experts(self, stacks: Sequence[Sequence[Weight]]):
        return self.backend.prepare_experts(next(self._names), len(stacks), lambda: stacks)

    def prepare_table(self, weight: Weight):
        return self.backend.prepare_table(next(self._names), lambda: weight)

    def _vector(self, weight: torch.Tensor | None):
        return None if weight is None else self.backend.prepare_vector(weight.numpy())

    def _rope(self, rope: RopeTable):
        return self.backend.prepare_rope(RopeTable(np.asarray(rope.cos), np.asarray(rope.sin), rope.interleaved))


class ReferenceOps(EagerOps):
    def __init__(self, activations: str = "f32") -> None:
        super().__init__(ReferenceBackend(activations=activations))
        self.linear, self.gated, self.add = self.backend.linear, self.backend.gated, self.backend.add

    def embed(self, ids: torch.Tensor, table, scale: float = 1.0) -> torch.Tensor:
        return self.backend.embed(StepTokens(ids, ids, ids, ids, ids), table, scale)

    def rmsnorm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return self.backend.rmsnorm(x, weight, eps)

    def add_rmsnorm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        return self.backend.add_rmsnorm(x, residual, weight, eps)

    def mixture(self, x, router, used: int, renormalize: bool, gate_up, down, activation: str) -> torch.Tensor:
        return self.backend.experts(x, self.backend.route(x, router, used, renormalize), gate_up, down, activation)

    def rope_write_kv(self, qkv, heads, rope, q_norm, k_norm, eps, kv: KVPages, extents: Extents) -> torch.Tensor:
        return self.backend.rope_write_kv(qkv, heads, self._rope(rope), q_norm, k_norm, eps, kv, extents.tokens())

    def attention(self, q, heads: HeadShape, kv: KVPages, extents: Extents, scale: float, window: int | None) -> torch.Tensor:
        return self.backend.attention(q, heads, kv, extents.tokens(), scale, window)


class NativeOps(EagerOps):
    def __init__(self, threads: int | None = None, isa: str | None = None, activations: str = "f32") -> None:
        from headrace.kernels.cpu import CpuBackend

        super().__init__(CpuBackend(threads, isa, activations))
        self.isa, self.threads = self.backend.isa, self.backend.threads

    def embed(self, ids: torch.Tensor, table, scale: float = 1.0) -> torch.Tensor:
        return self._run(lambda ops: [ops.embed(None, table, scale)], [], _plain(len(ids), ids))[0]

    def rmsnorm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        weight = self._vector(weight)
        return self._run(lambda ops, x: [ops.rmsnorm(x, weight, eps)], [x])[0]

    def add_rmsnorm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        weight = self._vector(weight)
        normed, total = self._run(lambda ops, x, residual: ops.add_rmsnorm(x, residual, weight, eps), [x, residual])
        return normed, total

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self._run(lambda ops, x, residual: [ops.add(x, residual)], [x, residual])[0]

    def linear(self, x: torch.Tensor, weight) -> torch.Tensor:
        return self._run(lambda ops, x: [ops.linear(x, weight)], [x])[0]

    def gated(self, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
        return self._run(lambda ops, x: [ops.gated(x, activation)], [gate_up])[0]

    def mixture(self, x, router, used: int, renormalize: bool, gate_up, down, activation: str) -> torch.Tensor:
        return self._run(lambda ops, x: [ops.experts(x, ops.route(x, router, used, renormalize), gate_up, down, activation)], [x])[0]

    def rope_write_kv(self, qkv, heads, rope, q_norm, k_norm, eps, kv: KVPages, extents: Extents) -> torch.Tensor:
        table, q_norm, k_norm, pages = self._rope(rope), self._vector(q_norm), self._vector(k_norm), _pages(kv)
        record = lambda ops, x: [ops.rope_write_kv(x, heads, table, q_norm, k_norm, eps, pages, None)]  # noqa: E731
        q = self._run(record, [qkv], extents.batch())[0]
        kv.keys.copy_(torch.from_numpy(pages.keys).transpose(2, 3))
        kv.values.copy_(torch.from_numpy(pages.values)[..., : kv.values.shape[-1]])
        if kv.scales is not None:
            kv.scales.copy_(torch.from_numpy(pages.scales))
        return q

    def attention(self, q, heads: HeadShape, kv: KVPages, extents: Extents, scale: float, window: int | None) -> torch.Tensor:
        pages = _pages(kv)
        return self._run(lambda ops, x: [ops.attention(x, heads, pages, None, scale, window)], [q], extents.batch())[0]

    def rows(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return self._run(lambda ops, x: [ops.picked(x)], [x], picks=index)[0]

    def _run(
        self, record: Callable, inputs: list[torch.Tensor], batch: Batch | None = None, picks: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """What `record(recorder, *values)` gives for these inputs."""
        from headrace.kernels.cpu.recorder import Recorder

        recorder = Recorder()
        outputs = record(recorder, *(recorder.input(x.shape[1]) for x in inputs))
        tape, at = recorder.program(self.backend._engine, outputs)
        b = batch or _plain(len(inputs[0]))
        chosen = np.empty(0, np.int32) if picks is None else picks.numpy()
        ids = np.zeros(len(inputs[0]), np.int32) if inputs else b.ids
        tape.run(ids, b.positions, b.slots, b.query_start, b.pages, b.parents, chosen, [x.numpy() for x in inputs])
        return [torch.from_numpy(tape.view(at(value), value.width).copy()) for value in outputs]


def _plain(tokens: int, ids: torch.Tensor | None = None) -> Batch:
    """Tokens of one request, for ops that look at no page."""
    zeros = np.zeros(tokens, np.int32)
    return Batch(zeros if ids is None else ids.numpy(), zeros, zeros, np.array([0, tokens], np.int32), np.zeros((1, 1), np.int32))


def _pages(kv: KVPages):
    """A copy of the reference's pages, laid out for the native ops."""
    from headrace.kernels.cpu.pages import TYPES, Pages

    keys, padding = kv.keys.transpose(2, 3).numpy(), -kv.values.shape[-1] % 8
    values = torch.nn.functional.pad(kv.values, (0, padding)).numpy()
    scales = None if kv.scales is None else kv.scales.numpy().copy()
    if (kv.keys.shape, kv.keys.dtype) != (kv.values.shape, kv.values.dtype):
        return Pages(keys, values, scales)  # as wrong as they come
    number, heads, dim, page_size = keys.shape
    dtype = next(name for name, each in TYPES.items() if each == keys.dtype)
    (pages,) = Pages.new(1, number, page_size, HeadShape(heads, heads, dim), dtype)
    pages.keys[:], pages.values[:] = keys, values
    return replace(pages, scales=scales)
