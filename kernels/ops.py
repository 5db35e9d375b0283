"""The op table: every operation a model or a sampler may use, and nothing else.

A model is written against `Ops` alone. It never touches an activation with torch itself, so that an implementation may run an
op at once (`kernels.reference`), in native code (`kernels.cpu`), as a GPU kernel, or record it to be replayed.

Two rules bind every implementation:

- **Batch invariance.** A row of a result depends, to the last bit, on its own inputs alone: not on how many rows there are,
  on where it stands among them, or on how a sequence was cut into chunks. Reductions run in an order fixed by K or by the
  KV position.
- **Accumulation in float32.** Whatever the stored type.

Shapes: T tokens of R requests in a flat batch; H hidden size; Hq query heads and Hkv key/value heads of D; V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from headrace.kernels.weights import Weight

Prepared = Any
"""A weight in the form an implementation wants; only the implementation that made it may look inside."""


@dataclass(frozen=True, slots=True)
class KVPages:
    """The paged keys and values of one layer: each [pages, Hkv, page_size, D]."""

    keys: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True, slots=True)
class Extents:
    """Where the tokens of a flat batch belong. Request r owns rows `query_start[r] … query_start[r + 1] - 1`."""

    positions: torch.Tensor
    """int32 [T]: place of each token in its sequence, from 0."""
    slots: torch.Tensor
    """int32 [T]: page * page_size + offset where the token's K and V go."""
    query_start: torch.Tensor
    """int32 [R + 1]."""
    context: torch.Tensor
    """int32 [R]: tokens of the request whose K and V exist once this batch is written, its own rows included."""
    pages: torch.Tensor
    """int32 [R, most pages of a request]: page numbers in sequence order, padded with 0."""


@dataclass(frozen=True, slots=True)
class RopeTable:
    """cos and sin, float32 [positions, D_rot / 2] each, scaling and attention factor included.

    `interleaved` rotates pairs (2i, 2i+1), as GGUF files of the Llama architecture store their rows; otherwise pairs are
    (i, i + D_rot/2), as Hugging Face stores them.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool


@dataclass(frozen=True, slots=True)
class HeadShape:
    query_heads: int
    kv_heads: int
    dim: int


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """What `sample` must know of each of its B rows. Lists have one entry a row."""

    temperature: Sequence[float]
    top_k: Sequence[int]
    top_p: Sequence[float]
    min_p: Sequence[float]
    repetition_penalty: Sequence[float]
    presence_penalty: Sequence[float]
    frequency_penalty: Sequence[float]
    seed: Sequence[int]
    """64-bit."""
    position: Sequence[int]
    """Index of the token to be drawn in its request's output, from 0: the counter of the random numbers."""
    logit_bias: Sequence[Sequence[tuple[int, float]]]
    banned: Sequence[Sequence[int]]
    """Tokens that may not be chosen now (end tokens before `min_tokens`)."""
    prompt: Sequence[Sequence[int]]
    """Prompt ids; read only where repetition_penalty != 1."""
    output: Sequence[Sequence[int]]
    """Emitted ids; read only where a penalty is on."""
    logprobs: Sequence[int | None]
    """How many most likely tokens to report, None for no report at all."""


@dataclass(frozen=True, slots=True)
class Sampled:
    tokens: list[int]
    logprobs: list[tuple[float, list[int], list[float]] | None]
    """For each row that asked: the chosen token's logprob, then ids and logprobs of the most likely, by falling probability.

    Log-probabilities are of the model itself: log-softmax of the raw logits, before bias, penalties and temperature.
    """


class Ops(Protocol):
    """One typed function an op. All activations are float32 on the implementation's device."""

    name: str
    """"reference", "cpu" or "triton"."""

    def prepare(self, weights: Sequence[Weight], bias: torch.Tensor | None = None) -> Prepared:
        """A linear layer's weight. Several weights of equal K are stacked along N, so that one call computes them all.

        `bias` is float32 [sum of N]. May copy and repack; may keep a reference to memory-mapped storage.
        """
        ...

    def prepare_table(self, weight: Weight) -> Prepared:
        """An embedding table [V, H], for `embed`. May share storage with a `prepare` of the same weight (tied embeddings)."""
        ...

    def embed(self, ids: torch.Tensor, table: Prepared, scale: float = 1.0) -> torch.Tensor:
        """Rows `ids` (int32 [T]) of the table, times `scale` (rounded once, in float32): [T, H]."""
        ...

    def rmsnorm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x / sqrt(mean(x²) + eps) * weight over the last dimension (arXiv:1910.07467). x [T, H], weight float32 [H]."""
        ...

    def add_rmsnorm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        """(rmsnorm(residual + x), residual + x), both [T, H]."""
        ...

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """residual + x, [T, H]."""
        ...

    def linear(self, x: torch.Tensor, weight: Prepared) -> torch.Tensor:
        """x [T, K] times the prepared [N, K] transposed, plus its bias: [T, N]."""
        ...

    def gated(self, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
        """activation(gate) * up, where gate and up are the halves of gate_up [T, 2F]: [T, F].

        `activation` is "silu" or "gelu_tanh" (the tanh approximation).
        """
        ...

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
        """Split qkv [T, (Hq + 2 Hkv) D] into heads, RMS-normalize q and k where a weight [D] is given, rotate q and k, and
        write k and v to their slots. Returns q [T, Hq * D]. (RoPE: arXiv:2104.09864.)
        """
        ...

    def attention(
        self,
        q: torch.Tensor,
        heads: HeadShape,
        kv: KVPages,
        extents: Extents,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        """Causal softmax(q k^T * scale) v over the paged K and V of each token's own request: [T, Hq * D].

        A token at position p sees positions max(0, p - window + 1) … p, or 0 … p without a window. Query head h reads KV
        head h // (Hq / Hkv). KV is walked in splits of a fixed number of positions, combined in order (arXiv:2205.14135).
        """
        ...

    def rows(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """x[index] for int32 index [B]: [B, H]."""
        ...

    def sample(self, logits: torch.Tensor, batch: SamplingBatch) -> Sampled:
        """Choose one token for each row of logits [B, V]; see `Sampling` for order and meaning of the parameters."""
        ...

    def score(self, logits: torch.Tensor, tokens: Sequence[int], top: int) -> list[tuple[float, list[int], list[float]]]:
        """For each row of logits [B, V]: log-probability of `tokens[b]`, and the `top` most likely ids with theirs."""
        ...
