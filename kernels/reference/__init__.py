"""The reference backend: plain torch, one file an op, on any device torch has.

It is the oracle that the native and the GPU kernels are compared with, and the path that serves where they cannot. It is
batch-invariant by construction: `tiles.py` says how for matrix products, `exact.py` for everything else. A compiled model is the model
itself: every op runs at once.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from headrace.kernels.drafts import DraftTrees, Verified, walk
from headrace.kernels.kv_rows import KVRows
from headrace.kernels.ops import Batch, HeadShape, Model, RopeTable, Sampled, SamplingBatch
from headrace.kernels.reference import experts as experts_op
from headrace.kernels.reference import moves, sampling
from headrace.kernels.reference.attention import attention
from headrace.kernels.reference.embed import Table, embed
from headrace.kernels.reference.gated import gated
from headrace.kernels.reference.linear import PreparedLinear, linear, prepare
from headrace.kernels.reference.norm import rmsnorm
from headrace.kernels.reference.rejection import rejection_sample
from headrace.kernels.reference.rope import Rope, rope_write_kv
from headrace.kernels.reference.step import LARGEST, TYPES, KVPages, StepTokens
from headrace.kernels.room import host_room
from headrace.kernels.weights import Weight


class ReferenceBackend:
    """`headrace.kernels.ops.Backend`, whose docstrings hold here, and its `Ops` in one. Weights and results live on `device`."""

    name = "reference"
    kv_types = tuple(TYPES)
    step_tokens = 256

    def __init__(self, device: str = "cpu", threads: int | None = None, activations: str = "f32") -> None:
        self.device = torch.device(device)
        self._activations = activations
        if threads is not None:
            torch.set_num_threads(threads)

    def keep(self, folder: Path, version: str) -> None:
        """Nothing is kept: weights are dequantized at every start."""

    def prepare(self, name: str, weights: Callable[[], Sequence[Weight]], bias: np.ndarray | None = None) -> PreparedLinear:
        return prepare(weights(), bias, self.device, self._activations)

    def prepare_experts(self, name: str, experts: int, weights: Callable[[], Sequence[Sequence[Weight]]]) -> Sequence[PreparedLinear]:
        return experts_op.alike([prepare(stack, None, self.device, self._activations) for stack in weights()], experts)

    def prepare_table(self, name: str, weight: Callable[[], Weight]) -> Table:
        return Table(weight(), self.device)

    def prepare_vector(self, values: np.ndarray) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.device)

    def prepare_rope(self, table: RopeTable) -> Rope:
        return Rope(torch.tensor(table.cos, device=self.device), torch.tensor(table.sin, device=self.device), table.interleaved)

    def new_kv(self, layers: int, pages: int, page_size: int, heads: HeadShape, dtype: str = "f32") -> list[KVPages]:
        return [KVPages.new(pages, page_size, heads, self.device, TYPES[dtype]) for _ in range(layers)]

    def page_bytes(self, layers: int, page_size: int, heads: HeadShape, dtype: str = "f32") -> int:
        position = 2 * (TYPES[dtype].itemsize * heads.dim + (4 if TYPES[dtype] in LARGEST else 0))
        return layers * heads.kv_heads * page_size * position

    def copy_kv(self, kv: Sequence[KVPages], from_slots: np.ndarray, to_slots: np.ndarray) -> None:
        moves.copy_kv(kv, from_slots, to_slots)

    def gather_kv(self, kv: Sequence[KVPages], pages: np.ndarray) -> KVRows:
        return moves.gather_kv(kv, pages)

    def scatter_kv(self, kv: Sequence[KVPages], pages: np.ndarray, rows: KVRows) -> None:
        moves.scatter_kv(kv, pages, rows)

    def kv_room(self) -> int:
        return host_room()

    def compile(self, model: Model, kv: Sequence[KVPages]) -> "ReferenceProgram":
        return ReferenceProgram(self, model, kv)

    def embed(self, tokens: StepTokens, table: Table, scale: float = 1.0) -> torch.Tensor:
        return embed(tokens.ids, table, scale)

    def rmsnorm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return rmsnorm(x, weight, eps)

    def add_rmsnorm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        total = residual + x
        return rmsnorm(total, weight, eps), total

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return residual + x

    def linear(self, x: torch.Tensor, weight: PreparedLinear) -> torch.Tensor:
        return linear(x, weight)

    def gated(self, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
        return gated(gate_up, activation)

    def route(self, x: torch.Tensor, router: PreparedLinear, used: int, renormalize: bool) -> experts_op.Routing:
        return experts_op.route(linear(x, router), used, renormalize)

    def experts(
        self,
        x: torch.Tensor,
        routing: experts_op.Routing,
        gate_up: Sequence[PreparedLinear],
        down: Sequence[PreparedLinear],
        activation: str,
    ) -> torch.Tensor:
        return experts_op.experts(x, routing, gate_up, down, activation)

    def rope_write_kv(
        self,
        qkv: torch.Tensor,
        heads: HeadShape,
        rope: Rope,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        eps: float,
        kv: KVPages,
        tokens: StepTokens,
    ) -> torch.Tensor:
        return rope_write_kv(qkv, heads, rope, q_norm, k_norm, eps, kv, tokens)

    def attention(
        self, q: torch.Tensor, heads: HeadShape, kv: KVPages, tokens: StepTokens, scale: float, window: int | None
    ) -> torch.Tensor:
        return attention(q, heads, kv, tokens, scale, window)

    def sample(self, logits: torch.Tensor, batch: SamplingBatch) -> Sampled:
        return sampling.sample(logits, batch)

    def score(self, logits: torch.Tensor, tokens: Sequence[int], top: int) -> list[tuple[float, list[int], list[float]]]:
        return sampling.score(logits, tokens, top)

    def verify(self, trees: DraftTrees, tokens: Sequence[int] | torch.Tensor) -> Verified:
        return walk(trees, tokens.tolist() if isinstance(tokens, torch.Tensor) else tokens)

    def rejection_sample(self, logits: torch.Tensor, batch: SamplingBatch, trees: DraftTrees, probabilities: torch.Tensor) -> Verified:
        return rejection_sample(logits, batch, trees, probabilities)


class ReferenceProgram:
    """`headrace.kernels.ops.Program`: the model, called step by step."""

    def __init__(self, backend: ReferenceBackend, model: Model, kv: Sequence[KVPages]) -> None:
        self._backend, self._model, self._kv = backend, model, kv
        self._states: tuple[torch.Tensor, ...] = ()

    @torch.inference_mode()
    def run(self, batch: Batch, picks: np.ndarray) -> torch.Tensor:
        self._states = self._model.forward(self._backend, StepTokens.of(batch, self._backend.device), self._kv)
        return self.logits(picks)

    @torch.inference_mode()
    def logits(self, picks: np.ndarray) -> torch.Tensor:
        assert self._states, "a step comes before its logits"
        rows = torch.from_numpy(picks).to(self._backend.device)
        hidden = self._model.finish(self._backend, *(state.index_select(0, rows) for state in self._states))
        return self._model.logits(self._backend, hidden)
