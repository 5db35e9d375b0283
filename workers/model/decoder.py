"""The one decoder: a stack of attention and MLP blocks, described by a `DecoderConfig`, computed by `Ops` alone.

    ids ─embed─▶ x ─┬─norm─qkv─rope─attention─o─(norm)─▶ + ─┬─norm─gate·up─down─(norm)─▶ + ─ … ─norm─▶ hidden ─head─▶ logits
                    └───────────────────────────────────────┘ residual

The worker builds it once, and calls `forward` for each step with the step's flat batch and `logits` for the rows that need them.
It never touches an activation itself, so that the ops may run at once, natively, on a GPU, or be recorded and replayed.
"""

from dataclasses import dataclass

import numpy as np
import torch

from headrace.engine.errors import UserError
from headrace.kernels.ops import Extents, HeadShape, KVPages, Ops, Prepared, RopeTable
from headrace.workers.loader import Checkpoint
from headrace.workers.model.config import DecoderConfig, WeightNames
from headrace.workers.model.families import describe
from headrace.workers.model.names import bias_of
from headrace.workers.model.rope import rope_table


@dataclass(frozen=True, slots=True)
class Layer:
    """What one block needs, in the form its ops want it."""

    attention_norm: torch.Tensor
    qkv: Prepared
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    rope: RopeTable
    window: int | None
    output: Prepared
    post_attention_norm: torch.Tensor | None
    mlp_norm: torch.Tensor
    gate_up: Prepared
    down: Prepared
    post_mlp_norm: torch.Tensor | None


class Decoder:
    """A loaded model on one device, for texts of at most `context` tokens."""

    def __init__(
        self,
        config: DecoderConfig,
        names: WeightNames,
        checkpoint: Checkpoint,
        ops: Ops,
        context: int,
        device: str | torch.device = "cpu",
    ) -> None:
        """Prepares every weight. Raises UserError for a tensor that is missing or of the wrong shape, or a context beyond the model's."""
        if not 1 <= context <= config.context:
            raise UserError(f"a context of {context} tokens cannot be served: the model was made for 1 to {config.context}")
        self.config, self.ops, self.context, self.device = config, ops, context, torch.device(device)
        self.heads = HeadShape(config.heads, config.kv_heads, config.head_dim)
        load = _Loading(config, names, checkpoint, ops, self.device)
        self.embedding = load.table()
        self.head = load.head()
        self.final_norm = load.norm(names.final_norm, config.hidden)
        tables: dict[int, RopeTable] = {}
        for layer in config.layers:
            if id(layer.rope) not in tables:
                tables[id(layer.rope)] = rope_table(layer.rope, context, self.device)
        self.layers = [load.layer(index, tables[id(layer.rope)]) for index, layer in enumerate(config.layers)]

    def new_kv(self, pages: int, page_size: int) -> list[KVPages]:
        """Room for `pages` pages of `page_size` tokens in every layer, float32, filled with zeros.

        On a CPU the system hands the memory out when a page is first written, so that unused room costs nothing.
        """
        shape = (pages, self.config.kv_heads, page_size, self.config.head_dim)

        def room() -> torch.Tensor:
            if self.device.type == "cpu":
                return torch.from_numpy(np.zeros(shape, np.float32))
            return torch.zeros(shape, dtype=torch.float32, device=self.device)

        return [KVPages(room(), room()) for _ in self.layers]

    def forward(self, ids: torch.Tensor, extents: Extents, kv: list[KVPages]) -> torch.Tensor:
        """One step: ids (int32 [T]) of the flat batch to hidden states [T, H] after the final norm. Writes K and V to their slots."""
        ops, config = self.ops, self.config
        residual = ops.embed(ids, self.embedding, config.embedding_scale)
        x = ops.rmsnorm(residual, self.layers[0].attention_norm, config.norm_eps)
        next_norms = [layer.attention_norm for layer in self.layers[1:]] + [self.final_norm]
        for layer, pages, next_norm in zip(self.layers, kv, next_norms, strict=True):
            x = self._attend(layer, x, extents, pages)
            x, residual = ops.add_rmsnorm(x, residual, layer.mlp_norm, config.norm_eps)
            x = self._feed_forward(layer, x)
            x, residual = ops.add_rmsnorm(x, residual, next_norm, config.norm_eps)
        return x

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Rows of `forward`'s result [B, H] to logits [B, V]."""
        return self.ops.linear(hidden, self.head)

    def _attend(self, layer: Layer, x: torch.Tensor, extents: Extents, pages: KVPages) -> torch.Tensor:
        ops, config = self.ops, self.config
        qkv = ops.linear(x, layer.qkv)
        q = ops.rope_write_kv(qkv, self.heads, layer.rope, layer.q_norm, layer.k_norm, config.norm_eps, pages, extents)
        x = ops.linear(ops.attention(q, self.heads, pages, extents, config.attention_scale, layer.window), layer.output)
        return x if layer.post_attention_norm is None else ops.rmsnorm(x, layer.post_attention_norm, config.norm_eps)

    def _feed_forward(self, layer: Layer, x: torch.Tensor) -> torch.Tensor:
        ops, config = self.ops, self.config
        x = ops.linear(ops.gated(ops.linear(x, layer.gate_up), config.activation), layer.down)
        return x if layer.post_mlp_norm is None else ops.rmsnorm(x, layer.post_mlp_norm, config.norm_eps)


def load_decoder(architecture: str, checkpoint: Checkpoint, ops: Ops, context: int, device: str | torch.device = "cpu") -> Decoder:
    """The checkpoint's decoder, ready to run; `architecture` is a key of `FAMILIES`. Raises UserError."""
    config, names = describe(architecture, checkpoint)
    return Decoder(config, names, checkpoint, ops, context, device)


class _Loading:
    """Reads weights by name and checks that each has the shape the config promises."""

    def __init__(self, config: DecoderConfig, names: WeightNames, checkpoint: Checkpoint, ops: Ops, device: torch.device) -> None:
        self.config, self.names, self.checkpoint, self.ops, self.device = config, names, checkpoint, ops, device

    def table(self) -> Prepared:
        self._check(self.names.embedding, (self.config.vocab_size, self.config.hidden))
        return self.ops.prepare_table(self.checkpoint.weight(self.names.embedding))

    def head(self) -> Prepared:
        name = self.names.embedding if self.config.tied_embeddings else self.names.head
        return self.linear([(name, self.config.vocab_size)], self.config.hidden, bias=False)

    def layer(self, index: int, rope: RopeTable) -> Layer:
        c, names = self.config, self.names

        def named(pattern: str) -> str:
            return pattern.format(index)

        def norm(pattern: str, size: int, present: bool = True) -> torch.Tensor | None:
            return self.norm(named(pattern), size) if present else None

        q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
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
            gate_up=self.linear([(named(names.gate), c.mlp), (named(names.up), c.mlp)], c.hidden, c.mlp_bias),
            down=self.linear([(named(names.down), c.hidden)], c.mlp, c.mlp_bias),
            post_mlp_norm=norm(names.post_mlp_norm, c.hidden, c.sandwich_norms),
        )

    def linear(self, parts: list[tuple[str, int]], inputs: int, bias: bool) -> Prepared:
        """The named weights of so many outputs each, stacked."""
        for name, outputs in parts:
            self._check(name, (outputs, inputs))
            if bias:
                self._check(bias_of(name), (outputs,))
        weights = [self.checkpoint.weight(name) for name, _ in parts]
        biases = torch.cat([self.checkpoint.vector(bias_of(name)) for name, _ in parts]) if bias else None
        return self.ops.prepare(weights, biases)

    def norm(self, name: str, size: int) -> torch.Tensor:
        self._check(name, (size,))
        weight = self.checkpoint.vector(name).to(self.device)
        return weight + 1.0 if self.config.unit_offset_norms else weight

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self.checkpoint:
            raise UserError(f"the checkpoint lacks tensor {name}: the file is incomplete, get it anew")
        if (found := tuple(self.checkpoint.shape(name))) != shape:
            raise UserError(f"tensor {name} has shape {list(found)} where the model's metadata asks for {list(shape)}: the file is corrupt")
