"""The reference implementation of the op table: plain torch, one file an op, on any device torch has.

It is the oracle that the native and the GPU kernels are compared with, and the path that serves where they cannot. It is
batch-invariant by construction: `tiles.py` says how for matrix products, `exact.py` for everything else.
"""

from collections.abc import Sequence

import torch

from headrace.kernels.ops import Extents, HeadShape, KVPages, RopeTable, Sampled, SamplingBatch
from headrace.kernels.reference import sampling
from headrace.kernels.reference.attention import attention
from headrace.kernels.reference.embed import embed, rows
from headrace.kernels.reference.gated import gated
from headrace.kernels.reference.linear import PreparedLinear, linear, prepare
from headrace.kernels.reference.norm import rmsnorm
from headrace.kernels.reference.rope import rope_write_kv
from headrace.kernels.weights import Weight


class ReferenceOps:
    """`headrace.kernels.ops.Ops`, whose docstrings hold here. Its weights and results live on `device`."""

    name = "reference"

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)

    def prepare(self, weights: Sequence[Weight], bias: torch.Tensor | None = None) -> PreparedLinear:
        return prepare(weights, bias, self.device)

    def prepare_table(self, weight: Weight) -> Weight:
        return weight.to(self.device)

    def embed(self, ids: torch.Tensor, table: Weight, scale: float = 1.0) -> torch.Tensor:
        return embed(ids, table, scale)

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
        return rope_write_kv(qkv, heads, rope, q_norm, k_norm, eps, kv, extents)

    def attention(self, q: torch.Tensor, heads: HeadShape, kv: KVPages, extents: Extents, scale: float, window: int | None) -> torch.Tensor:
        return attention(q, heads, kv, extents, scale, window)

    def rows(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return rows(x, index)

    def sample(self, logits: torch.Tensor, batch: SamplingBatch) -> Sampled:
        return sampling.sample(logits, batch)

    def score(self, logits: torch.Tensor, tokens: Sequence[int], top: int) -> list[tuple[float, list[int], list[float]]]:
        return sampling.score(logits, tokens, top)
