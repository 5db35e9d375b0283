"""The one decoder: a stack of attention and MLP blocks, described by a `DecoderConfig`, computed by `Ops` alone.

    ids ─embed─▶ x ─┬─norm─qkv─rope─attention─o─(norm)─▶ + ─┬─norm─gate·up─down─(norm)─▶ + ─ … ─norm─▶ hidden ─head─▶ logits
                    └───────────────────────────────────────┘ residual

A layer's MLP may be a mixture of experts: a router chooses which of them a token goes to, and what they give is added up.

The worker builds it once and lets the backend compile it. It never touches an activation itself, so that the ops may run at once, on a
GPU, or be recorded and replayed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from headrace.engine.errors import UserError
from headrace.kernels.ops import Array, Backend, HeadShape, KVPages, Ops, Prepared, Tokens
from headrace.kernels.weights import Weight
from headrace.workers.loader import Checkpoint
from headrace.workers.model.config import DecoderConfig, ExpertsConfig, WeightNames
from headrace.workers.model.families import describe
from headrace.workers.model.names import bias_of
from headrace.workers.model.rope import rope_table


@dataclass(frozen=True, slots=True)
class Layer:
    """What one block needs, in the form its ops want it."""

    attention_norm: Prepared
    qkv: Prepared
    q_norm: Prepared | None
    k_norm: Prepared | None
    rope: Prepared
    window: int | None
    output: Prepared
    post_attention_norm: Prepared | None
    mlp_norm: Prepared
    experts: ExpertsConfig | None
    router: Prepared | None
    gate_up: Prepared
    """Of one MLP, or of all experts."""
    down: Prepared
    post_mlp_norm: Prepared | None


class Decoder:
    """A loaded model, prepared by one backend, for texts of at most `context` tokens. It is a `headrace.kernels.ops.Model`."""

    def __init__(self, config: DecoderConfig, names: WeightNames, checkpoint: Checkpoint, backend: Backend, context: int) -> None:
        """Prepares every weight. Raises UserError for a tensor that is missing or of the wrong shape, or a context beyond the model's."""
        if not 1 <= context <= config.context:
            raise UserError(f"a context of {context} tokens cannot be served: the model was made for 1 to {config.context}")
        self.config, self.context = config, context
        self.heads = head_shape(config)
        load = _Loading(config, names, checkpoint, backend)
        self.embedding = load.table()
        self.head = load.head()
        self.final_norm = load.norm(names.final_norm, config.hidden)
        tables: dict[int, Prepared] = {}
        for layer in config.layers:
            if id(layer.rope) not in tables:
                tables[id(layer.rope)] = backend.prepare_rope(rope_table(layer.rope, context))
        self.layers = [load.layer(index, tables[id(layer.rope)]) for index, layer in enumerate(config.layers)]

    def forward(self, ops: Ops, tokens: Tokens, kv: Sequence[KVPages]) -> tuple[Array, Array]:
        """One step: what the tokens of the flat batch attend to in the last layer [T, Hq * D], and the residual there [T, H]. What follows
        concerns nobody but those of whom logits are wanted. Writes K and V to their slots."""
        config = self.config
        residual = ops.embed(tokens, self.embedding, config.embedding_scale)
        x = ops.rmsnorm(residual, self.layers[0].attention_norm, config.norm_eps)
        for layer, pages, following in zip(self.layers, kv, self.layers[1:], strict=False):
            x, residual = self._after_attention(ops, layer, self._attend(ops, layer, x, tokens, pages), residual, following.attention_norm)
        return self._attend(ops, self.layers[-1], x, tokens, kv[-1]), residual

    def finish(self, ops: Ops, attended: Array, residual: Array) -> Array:
        """Rows of `forward`'s results to hidden states [B, H] after the final norm."""
        return self._after_attention(ops, self.layers[-1], attended, residual, self.final_norm)[0]

    def logits(self, ops: Ops, hidden: Array) -> Array:
        """Hidden states [B, H] to logits [B, V]."""
        return ops.linear(hidden, self.head)

    def _attend(self, ops: Ops, layer: Layer, x: Array, tokens: Tokens, pages: KVPages) -> Array:
        config = self.config
        qkv = ops.linear(x, layer.qkv)
        q = ops.rope_write_kv(qkv, self.heads, layer.rope, layer.q_norm, layer.k_norm, config.norm_eps, pages, tokens)
        return ops.attention(q, self.heads, pages, tokens, config.attention_scale, layer.window)

    def _after_attention(self, ops: Ops, layer: Layer, attended: Array, residual: Array, next_norm: Prepared) -> tuple[Array, Array]:
        """The rest of a layer: the next one's normed input, and the residual there."""
        eps = self.config.norm_eps
        x = ops.linear(attended, layer.output)
        x = x if layer.post_attention_norm is None else ops.rmsnorm(x, layer.post_attention_norm, eps)
        x, residual = ops.add_rmsnorm(x, residual, layer.mlp_norm, eps)
        return ops.add_rmsnorm(self._feed_forward(ops, layer, x), residual, next_norm, eps)

    def _feed_forward(self, ops: Ops, layer: Layer, x: Array) -> Array:
        config = self.config
        if (experts := layer.experts) is None:
            x = ops.linear(ops.gated(ops.linear(x, layer.gate_up), config.activation), layer.down)
        else:
            routing = ops.route(x, layer.router, experts.used, experts.renormalize)
            x = ops.experts(x, routing, layer.gate_up, layer.down, config.activation)
        return x if layer.post_mlp_norm is None else ops.rmsnorm(x, layer.post_mlp_norm, config.norm_eps)


def head_shape(config: DecoderConfig) -> HeadShape:
    return HeadShape(config.heads, config.kv_heads, config.head_dim)


def load_decoder(architecture: str, checkpoint: Checkpoint, backend: Backend, context: int) -> Decoder:
    """The checkpoint's decoder, ready to be compiled; `architecture` is a key of `FAMILIES`. Raises UserError."""
    config, names = describe(architecture, checkpoint)
    return Decoder(config, names, checkpoint, backend, context)


class _Loading:
    """Reads weights by name and checks that each has the shape the config promises."""

    def __init__(self, config: DecoderConfig, names: WeightNames, checkpoint: Checkpoint, backend: Backend) -> None:
        self.config, self.names, self.checkpoint, self.backend = config, names, checkpoint, backend

    def table(self) -> Prepared:
        name = self.names.embedding
        self._check(name, (self.config.vocab_size, self.config.hidden))
        return self.backend.prepare_table(name, lambda: self.checkpoint.weight(name))

    def head(self) -> Prepared:
        name = self.names.embedding if self.config.tied_embeddings else self.names.head
        return self.linear([(name, self.config.vocab_size)], self.config.hidden, bias=False)

    def layer(self, index: int, rope: Prepared) -> Layer:
        c, names = self.config, self.names

        def named(pattern: str) -> str:
            return pattern.format(index)

        def norm(pattern: str, size: int, present: bool = True) -> Prepared | None:
            return self.norm(named(pattern), size) if present else None

        q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
        experts = c.layers[index].experts
        router, gate_up, down = self.mlp(index) if experts is None else self.experts(index, experts)
        return Layer(
            attention_norm=self.norm(named(names.attention_norm), c.hidden),
            qkv=self.linear([(named(names.q), q), (named(names.k), kv), (named(names.v), kv)], c.hidden, c.qkv_bias),
            q_norm=norm(names.q_norm, c.head_dim, c.qk_norm),
            k_norm=norm(names.k_norm, c.head_dim, c.qk_norm),
            rope=rope,
            window=c.layers[index].window,
            output=self.linear([(named(names.o), c.hidden)], q, c.output_bias),
            post_attention_norm=norm(names.post_attention_norm, c.hidden, c.sandwich_norms),
            mlp_norm=self.norm(named(names.mlp_norm), c.hidden),
            experts=experts,
            router=router,
            gate_up=gate_up,
            down=down,
            post_mlp_norm=norm(names.post_mlp_norm, c.hidden, c.sandwich_norms),
        )

    def mlp(self, index: int) -> tuple[None, Prepared, Prepared]:
        """No router, gate and up, down."""
        c, gate, up, down = self.config, *(name.format(index) for name in (self.names.gate, self.names.up, self.names.down))
        gate_up = self.linear([(gate, c.mlp), (up, c.mlp)], c.hidden, c.mlp_bias)
        return None, gate_up, self.linear([(down, c.hidden)], c.mlp, c.mlp_bias)

    def experts(self, index: int, experts: ExpertsConfig) -> tuple[Prepared, Prepared, Prepared]:
        """The router, all experts' gate and up, their down."""
        hidden, names = self.config.hidden, self.names
        router = self.linear([(names.router.format(index), experts.count)], hidden, bias=False)
        stacked = 2 * experts.mlp // len(names.expert_gate_up)
        gate_up = self.expert_linear(index, [(pattern, stacked) for pattern in names.expert_gate_up], hidden, experts.count)
        return router, gate_up, self.expert_linear(index, [(names.expert_down, hidden)], experts.mlp, experts.count)

    def expert_linear(self, index: int, parts: list[tuple[str, int]], inputs: int, count: int) -> Prepared:
        """The named weights of so many outputs each, stacked, of all experts."""
        separate = parts[0][0].count("{}") == 2
        columns = [[pattern.format(index, expert) for expert in range(count if separate else 1)] for pattern, _ in parts]
        for (_, outputs), column in zip(parts, columns, strict=True):
            for name in column:
                self._check(name, (outputs, inputs) if separate else (count, outputs, inputs))

        def weights() -> list[tuple[Weight, ...]]:
            read = self.checkpoint
            each = [[read.weight(name) for name in column] if separate else read.experts(column[0]) for column in columns]
            return list(zip(*each, strict=True))

        return self.backend.prepare_experts(columns[0][0], count, weights)

    def linear(self, parts: list[tuple[str, int]], inputs: int, bias: bool) -> Prepared:
        """The named weights of so many outputs each, stacked."""
        for name, outputs in parts:
            self._check(name, (outputs, inputs))
            if bias:
                self._check(bias_of(name), (outputs,))
        biases = np.concatenate([self.checkpoint.vector(bias_of(name)) for name, _ in parts]) if bias else None
        return self.backend.prepare(parts[0][0], lambda: [self.checkpoint.weight(name) for name, _ in parts], biases)

    def norm(self, name: str, size: int) -> Prepared:
        self._check(name, (size,))
        weight = self.checkpoint.vector(name)
        return self.backend.prepare_vector(weight + np.float32(1) if self.config.unit_offset_norms else weight)

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self.checkpoint:
            raise UserError(f"the checkpoint lacks tensor {name}: the file is incomplete, get it anew")
        if (found := tuple(self.checkpoint.shape(name))) != shape:
            raise UserError(f"tensor {name} has shape {list(found)} where the model's metadata asks for {list(shape)}: the file is corrupt")
