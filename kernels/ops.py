"""The op table: every operation a model or a sampler may use, and nothing else.

A `Backend` is one implementation on one device. It prepares weights when a model is loaded, and compiles the model, a function written
against `Ops` alone, into a `Program` that is run once a step. A model never touches an activation itself, so that an implementation
may run an op at once (`kernels.reference`), or record all of them once and replay them natively (`kernels.cpu`) or as a graph of a GPU.

    weights ── Backend.prepare… ──▶ Prepared ─┐
    model(ops, tokens) ───────────────────────┴─ Backend.compile ──▶ Program ── run(Batch) ──▶ logits ── Backend.sample ──▶ tokens

Two rules bind every implementation:

- **Batch invariance.** A row of a result depends, to the last bit, on its own inputs alone: not on how many rows there are,
  on where it stands among them, or on how a sequence was cut into chunks. Reductions run in an order fixed by K or by the
  KV position.
- **Accumulation in float32** (or exactly, in integers). Whatever the stored type.

Shapes: T tokens of R requests in a flat batch; H hidden size; Hq query heads and Hkv key/value heads of D; F width of an MLP; E experts;
V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from headrace.kernels.drafts import DraftTrees, Verified
from headrace.kernels.kv_rows import KVRows
from headrace.kernels.weights import Weight

Prepared = Any
"""A weight in the form an implementation wants; only the implementation that made it may look inside."""
Array = Any
"""An activation, float32 [rows, width], in the form in which an implementation passes it from op to op."""
Tokens = Any
"""The tokens of a step, their ids, places and pages: what `embed`, `rope_write_kv` and `attention` must be told."""
Routing = Any
"""Which experts each token of a step goes to, and what each counts: what `route` gives and `experts` takes."""
KVPages = Any
"""The paged keys and values of one layer."""


@dataclass(frozen=True, slots=True)
class Batch:
    """The tokens of a step. Request r owns rows `query_start[r] … query_start[r + 1] - 1`. All arrays are contiguous int32."""

    ids: np.ndarray
    """[T]."""
    positions: np.ndarray
    """[T]: place of each token in its sequence, from 0."""
    slots: np.ndarray
    """[T]: page * page_size + offset where the token's K and V go."""
    query_start: np.ndarray
    """[R + 1]."""
    pages: np.ndarray
    """[R, most pages of a request]: page numbers in sequence order, padded with 0."""
    parents: np.ndarray | None = None
    """[T], where rows form trees (drafts that are verified together, arXiv:2305.09781): which row of its request, counted from 0, each row
    follows, an earlier one; -1 for the tokens computed before. Its position is one more than its parent's. K and V of the i-th row go to
    the place of the request's first position, plus i. None: every row follows the one before it."""


@dataclass(frozen=True, slots=True)
class RopeTable:
    """cos and sin, float32 [positions, D_rot / 2] each, scaling and attention factor included.

    `interleaved` rotates pairs (2i, 2i+1), as GGUF files of the Llama architecture store their rows; otherwise pairs are
    (i, i + D_rot/2), as Hugging Face stores them.
    """

    cos: np.ndarray
    sin: np.ndarray
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
    position: list[int]
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
    """One typed function an op, for use inside a model that is being compiled."""

    def embed(self, tokens: Tokens, table: Prepared, scale: float = 1.0) -> Array:
        """The tokens' rows of the table, times `scale` (rounded once, in float32): [T, H]."""
        ...

    def rmsnorm(self, x: Array, weight: Prepared, eps: float) -> Array:
        """x / sqrt(mean(x²) + eps) * weight over the last dimension (arXiv:1910.07467). x [T, H], weight [H]."""
        ...

    def add_rmsnorm(self, x: Array, residual: Array, weight: Prepared, eps: float) -> tuple[Array, Array]:
        """(rmsnorm(residual + x), residual + x), both [T, H]."""
        ...

    def add(self, x: Array, residual: Array) -> Array:
        """residual + x, [T, H]."""
        ...

    def linear(self, x: Array, weight: Prepared) -> Array:
        """x [T, K] times the prepared [N, K] transposed, plus its bias: [T, N]."""
        ...

    def gated(self, gate_up: Array, activation: str) -> Array:
        """activation(gate) * up, where gate and up are the halves of gate_up [T, 2F]: [T, F].

        `activation` is "silu" or "gelu_tanh" (the tanh approximation).
        """
        ...

    def route(self, x: Array, router: Prepared, used: int, renormalize: bool) -> Routing:
        """Choose `used` of E experts for each token: those with the highest logits, by falling logit, equal ones by number.

        The logits [T, E] are x [T, H] times the prepared router [E, H] transposed. A chosen expert's weight, float32, is its share of the
        softmax over all E logits, or with `renormalize` of that over the chosen ones' (arXiv:2401.04088, section 2.1). Where a logit is
        NaN, so are the token's weights. ValueError unless 1 <= used <= E.
        """
        ...

    def experts(self, x: Array, routing: Routing, gate_up: Prepared, down: Prepared, activation: str) -> Array:
        """The gated MLPs of each token's experts, added up by their weights: [T, H].

            y[t] = 0 + weight[t, 0] * mlp(expert[t, 0], x[t]) + weight[t, 1] * … in the order of `route`, where
            mlp(e, x) = gated(x gate_up[e]^T, activation) down[e]^T

        x [T, H]; gate_up [E, 2F, H] and down [E, H, F] are of `prepare_experts`. Which other tokens share an expert changes nothing.
        ValueError for numbers of experts that differ.
        """
        ...

    def rope_write_kv(
        self,
        qkv: Array,
        heads: HeadShape,
        rope: Prepared,
        q_norm: Prepared | None,
        k_norm: Prepared | None,
        eps: float,
        kv: KVPages,
        tokens: Tokens,
    ) -> Array:
        """Split qkv [T, (Hq + 2 Hkv) D] into heads, RMS-normalize q and k where a weight [D] is given, rotate q and k, and
        write k and v to their slots. Returns q [T, Hq * D]. (RoPE: arXiv:2104.09864.)
        """
        ...

    def attention(self, q: Array, heads: HeadShape, kv: KVPages, tokens: Tokens, scale: float, window: int | None) -> Array:
        """Causal softmax(q k^T * scale) v over the paged K and V of each token's own request: [T, Hq * D].

        A token at position p sees positions max(0, p - window + 1) … p, or 0 … p without a window; in a tree those of its own path, and
        comes out as if that path were computed alone, to the last bit. Query head h reads KV
        head h // (Hq / Hkv). KV is walked in splits of a fixed number of positions, combined in order (arXiv:2205.14135).
        """
        ...


class Model(Protocol):
    """What a backend compiles: three functions over `Ops`, without a branch that depends on an activation.

    tokens ─ forward ─▶ states of all T tokens ─ B of their rows ─▶ finish ─▶ hidden states ─▶ logits
    """

    def forward(self, ops: Ops, tokens: Tokens, kv: Sequence[KVPages]) -> tuple[Array, ...]:
        """The step's tokens, as far as others may see them: up to the last attention. Writes K and V to their slots, layer by layer. What
        is given back [T, …] is all that `finish` needs of a token."""
        ...

    def finish(self, ops: Ops, *states: Array) -> Array:
        """Some rows of what `forward` gave [B, …] to hidden states [B, H]."""
        ...

    def logits(self, ops: Ops, hidden: Array) -> Array:
        """Hidden states [B, H] to logits [B, V]."""
        ...


class Program(Protocol):
    """A compiled model. Its results stay where they are until its next call."""

    def run(self, batch: Batch, picks: np.ndarray) -> Array:
        """Compute a step; the logits [B, V] of rows `picks` (int32 [B], perhaps none). ValueError for an index out of bounds."""
        ...

    def logits(self, picks: np.ndarray) -> Array:
        """The logits of other rows of the same step."""
        ...


class Backend(Protocol):
    """One implementation on one device."""

    name: str
    """"reference", "cpu" or "triton"."""
    kv_types: Sequence[str]
    """What `new_kv` can keep K and V in."""
    step_tokens: int
    """Tokens of a step beyond which more at once gain nothing that is worth the wait of those that decode beside them."""

    def keep(self, folder: Path, version: str) -> None:
        """What is prepared from now on may be kept in `folder`, which is the model's own, for later starts. `version` changes with what
        the weights are made from. Without this call nothing is kept."""
        ...

    def prepare(self, name: str, weights: Callable[[], Sequence[Weight]], bias: np.ndarray | None = None) -> Prepared:
        """A linear layer's weight. Several weights of equal K are stacked along N, so that one call computes them all.

        `bias` is float32 [sum of N]. `name` is unique in the model; a backend that keeps what it prepared may know the weight by it
        and then never ask for it. May keep a reference to memory-mapped storage.
        """
        ...

    def prepare_experts(self, name: str, experts: int, weights: Callable[[], Sequence[Sequence[Weight]]]) -> Prepared:
        """The linear layers of so many experts, one behind the other: as `prepare` does, those in `weights()[e]` are stacked along N to be
        the one of expert e. They are of the same shapes and forms for each. ValueError otherwise."""
        ...

    def prepare_table(self, name: str, weight: Callable[[], Weight]) -> Prepared:
        """An embedding table [V, H], for `embed`. Shares storage with a `prepare` of the same name (tied embeddings)."""
        ...

    def prepare_vector(self, values: np.ndarray) -> Prepared:
        """A norm's weight, float32 [H] or [D]."""
        ...

    def prepare_rope(self, table: RopeTable) -> Prepared: ...

    def new_kv(self, layers: int, pages: int, page_size: int, heads: HeadShape, dtype: str = "f32") -> list[KVPages]:
        """Room for `pages` pages of `page_size` tokens in each layer, filled with zeros, which keep K and V in `dtype`, one of `kv_types`:
        "f32", "f16", "bf16"; "int8" or "fp8": whole numbers, or float8 e4m3fn, with a float32 scale for each head of each position, which
        is the largest magnitude / 127, or / 448."""
        ...

    def page_bytes(self, layers: int, page_size: int, heads: HeadShape, dtype: str = "f32") -> int:
        """Bytes that one page takes in all layers together."""
        ...

    def copy_kv(self, kv: Sequence[KVPages], from_slots: np.ndarray, to_slots: np.ndarray) -> None:
        """K and V, and their scales, of the positions at `from_slots` to `to_slots`, in all layers and bit for bit: what a tree needs when
        the accepted rows move up to the places of their positions. int32 [M] each, page * page_size + offset.

        As if all were read before any is written: a slot may be in both, and two may change places. Those in `to_slots` are distinct, one
        in `from_slots` may go to several. `kv` is what `new_kv` gave. ValueError for slots that are not there, or twice in `to_slots`.
        """
        ...

    def gather_kv(self, kv: Sequence[KVPages], pages: np.ndarray) -> KVRows:
        """K and V of whole pages (int32 [n], in this order) as they are stored, out of all layers: n * page_size positions, for another
        process. All backends lay them out alike. ValueError for pages that are not there."""
        ...

    def scatter_kv(self, kv: Sequence[KVPages], pages: np.ndarray, rows: KVRows) -> None:
        """The inverse of `gather_kv`: `rows` to whole pages (int32 [n], distinct), whose size need not be that of the pages they come from.
        ValueError for pages that are not there or named twice, and for rows of other shapes or types than these pages have."""
        ...

    def kv_room(self) -> int:
        """Bytes that pages may take where nobody says otherwise. Asked when all weights have been prepared."""
        ...

    def compile(self, model: Model, kv: Sequence[KVPages]) -> Program:
        """The model's ops on these pages. Every weight has been prepared by now."""
        ...

    def sample(self, logits: Array, batch: SamplingBatch) -> Sampled:
        """Choose one token for each row of logits [B, V]. FloatingPointError where a row is invalid; see `Sampling` for order and
        meaning of the parameters."""
        ...

    def score(self, logits: Array, tokens: Sequence[int], top: int) -> list[tuple[float, list[int], list[float]]]:
        """For each row of logits [B, V]: log-probability of `tokens[b]`, and the `top` most likely ids with theirs."""
        ...

    def verify(self, trees: DraftTrees, tokens: Sequence[int] | Array) -> Verified:
        """The path of each tree whose drafts are the tokens that were sampled in their places anyway: greedy or seeded, what is emitted is
        the same as without drafts.

        `tokens` [N] are those that `sample` gave for the rows, each with its path before it taken for emitted; `NO_TOKEN` where a row's
        logits were invalid. A list, or an integer array where the implementation computes, which then is walked there. From the root on,
        a row's token is emitted, and its child with that token as draft is next (the first, if there are several). A path ends with an
        end token, before an invalid row, and where no child is right. ValueError for what are no trees.
        """
        ...

    def rejection_sample(self, logits: Array, batch: SamplingBatch, trees: DraftTrees, probabilities: Array) -> Verified:
        """The path of each tree by speculative sampling: more drafts are right than for `verify`, and what is emitted is distributed as if
        each token were sampled by `batch` (N rows, each with its path before it taken for emitted), though it is not the same.

        logits [N, V]; `probabilities` float32 [N, V], 0 to 1: for each row the distribution that its children were drawn from, the first
        from all of it, each further one from what its elder siblings left, without replacement, with random numbers of the drafter's own.
        Rows without children are not read. For drafts that were chosen without dice, as the k most likely, `verify` is right in
        distribution too. Of a row's children, in order, with p and q what target and draft have become (all in whole numbers, see
        `headrace.kernels.reference.rejection`):

            accept x if u < p(x) / q(x);   else p = normalized max(p - q, 0), q = normalized q without x;   after the last draw from p

        (arXiv:2305.09781, section 4.3, and arXiv:2302.01318, with q as in arXiv:2402.14160, which draws without replacement.) A child of
        which the draft's probability is 0 is passed over. Paths end as in `verify`. u of the i-th child of a row and of the draw after
        them are `philox.uniform(seed, position, draw)` for draw i and 0, i from 1. `batch.logprobs` is not read: see `score`.
        ValueError for what are no trees, for shapes that differ, and for siblings of one token; FloatingPointError for probabilities
        that are none.
        """
        ...
