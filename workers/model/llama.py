"""Llama 2 and 3.x, Mistral, SmolLM2: the plain form of the decoder, which other families start from. GGUF files of Mixtral as well.

GGUF files of the "llama" architecture store the rows of q and k so that rotated pairs stand side by side, hence `interleaved`.
Mistral's first models attend in a sliding window, the same in every layer.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from headrace.workers.loader import Checkpoint
from headrace.workers.model.config import DecoderConfig, LayerConfig, RopeConfig, WeightNames
from headrace.workers.model.experts import gguf_experts, gguf_names
from headrace.workers.model.metadata import Lookup
from headrace.workers.model.names import GGUF, HUGGINGFACE, has_bias
from headrace.workers.model.rope import gguf_rope, huggingface_rope

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}

Defaults = Mapping[str, Any]

MISTRAL: Defaults = {"num_key_value_heads": 8, "sliding_window": 4096}
"""What keys that a Mistral config.json leaves out mean; a null sliding_window means none."""


def describe(checkpoint: Checkpoint) -> tuple[DecoderConfig, WeightNames]:
    if checkpoint.format == "gguf":
        config = from_gguf(checkpoint, "llama", interleaved=True)
        window = Lookup(checkpoint.metadata, "llama.").get("attention.sliding_window")
        return with_windows(config, [window] * len(config.layers)), gguf_names(checkpoint, config)
    defaults = MISTRAL if checkpoint.metadata.get("model_type") == "mistral" else {}
    config = from_huggingface(checkpoint, "llama", defaults=defaults)
    window = {**defaults, **checkpoint.metadata}["sliding_window"] if defaults else None
    return with_windows(config, [window] * len(config.layers)), HUGGINGFACE


def with_windows(config: DecoderConfig, windows: list[int | None]) -> DecoderConfig:
    """The config with a window (None or 0: full attention) for each layer."""
    return replace(config, layers=tuple(replace(layer, window=w or None) for layer, w in zip(config.layers, windows, strict=True)))


def from_huggingface(
    checkpoint: Checkpoint, family: str, rope: RopeConfig | None = None, defaults: Defaults | None = None
) -> DecoderConfig:
    """What every supported family's config.json says in the same words, with full attention in all layers.

    `rope` replaces the config's own; `defaults` holds what keys that are not there mean in this family.
    """
    look = Lookup({**(defaults or {}), **checkpoint.metadata})
    hidden, heads = look.whole("hidden_size"), look.whole("num_attention_heads")
    kv_heads = look.whole("num_key_value_heads", heads)
    if heads % kv_heads:
        raise look.refused("num_key_value_heads", kv_heads, f"it must divide num_attention_heads={heads}")
    head_dim = look.whole("head_dim", max(1, hidden // heads))
    context = look.whole("max_position_embeddings")
    activation = look.get("hidden_activation") or look.get("hidden_act", "silu")
    if activation not in ACTIVATIONS:
        raise look.refused("hidden_act", activation, f"supported activations are {', '.join(ACTIVATIONS)}")
    if rope is None:
        settings = look.get("rope_parameters") or look.get("rope_scaling", {})
        rope = huggingface_rope(settings, look.real("rope_theta", 10000.0), head_dim, context)
    return DecoderConfig(
        family=family,
        vocab_size=look.whole("vocab_size"),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp=look.whole("intermediate_size"),
        context=context,
        norm_eps=look.real("rms_norm_eps", 1e-6),
        activation=ACTIVATIONS[activation],
        attention_scale=head_dim**-0.5,
        layers=(LayerConfig(window=None, rope=rope),) * look.whole("num_hidden_layers"),
        tied_embeddings=bool(look.get("tie_word_embeddings", False)),
        qkv_bias=has_bias(checkpoint, HUGGINGFACE.q),
        output_bias=has_bias(checkpoint, HUGGINGFACE.o),
        mlp_bias=has_bias(checkpoint, HUGGINGFACE.gate),
    )


def from_gguf(checkpoint: Checkpoint, family: str, interleaved: bool = False) -> DecoderConfig:
    """What every supported architecture's metadata says in the same words. Full attention in all layers.

    Keys: the GGUF specification, section "Standardized key-value pairs".
    """
    look = Lookup(checkpoint.metadata, checkpoint.metadata["general.architecture"] + ".")
    look.refuse_if_set("attention.clamp_kqv", "final_logit_softcapping", "attn_logit_softcapping")
    hidden, heads = look.whole("embedding_length"), look.whole("attention.head_count")
    kv_heads = look.whole("attention.head_count_kv", heads)
    if heads % kv_heads:
        raise look.refused("attention.head_count_kv", kv_heads, f"it must divide attention.head_count={heads}")
    head_dim = look.whole("attention.key_length", max(1, hidden // heads))
    if (value_dim := look.whole("attention.value_length", head_dim)) != head_dim:
        raise look.refused("attention.value_length", value_dim, f"it must equal the key length {head_dim}")
    rope = gguf_rope(checkpoint, look, head_dim, interleaved)
    config = DecoderConfig(
        family=family,
        vocab_size=checkpoint.shape(GGUF.embedding)[0],
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp=look.whole("feed_forward_length"),
        context=look.whole("context_length"),
        norm_eps=look.real("attention.layer_norm_rms_epsilon"),
        activation="silu",
        attention_scale=look.real("attention.scale", head_dim**-0.5),
        layers=(LayerConfig(window=None, rope=rope),) * look.whole("block_count"),
        tied_embeddings=GGUF.head not in checkpoint,
        qkv_bias=has_bias(checkpoint, GGUF.q),
        output_bias=has_bias(checkpoint, GGUF.o),
        mlp_bias=has_bias(checkpoint, GGUF.gate),
    )
    return gguf_experts(checkpoint, look, config)
