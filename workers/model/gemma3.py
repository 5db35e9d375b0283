"""Gemma 3 (text): local layers with a sliding window and rope of base 10,000, every sixth layer global with its own base and scaling;
norms before and after attention and MLP; embeddings scaled by sqrt(hidden); a tanh-GELU gate.

Hugging Face's files store norm weights minus one; GGUF files store them whole.
"""

import math
from dataclasses import replace

from headrace.engine.errors import UserError
from headrace.workers.loader import Checkpoint
from headrace.workers.model.config import DecoderConfig, LayerConfig, RopeConfig, WeightNames
from headrace.workers.model.llama import from_gguf, from_huggingface
from headrace.workers.model.metadata import Lookup
from headrace.workers.model.names import GGUF, HUGGINGFACE
from headrace.workers.model.rope import huggingface_rope, plain_frequencies

PATTERN = 6
"""Of so many layers, the last is global."""
LOCAL_THETA = 10000.0
GLOBAL_THETA = 1000000.0

DEFAULTS = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": PATTERN,
    "rope_theta": GLOBAL_THETA,
    "rope_local_base_freq": LOCAL_THETA,
    "tie_word_embeddings": True,
}
"""What keys that a config.json leaves out mean (those of the larger models leave out most)."""

_LAYERS_27B = 62
"""GGUF files do not carry the score scale. Only the model of 62 layers has another than 1/sqrt(head size)."""

HUGGINGFACE_NAMES = replace(
    HUGGINGFACE,
    mlp_norm="model.layers.{}.pre_feedforward_layernorm.weight",
    post_attention_norm="model.layers.{}.post_attention_layernorm.weight",
    post_mlp_norm="model.layers.{}.post_feedforward_layernorm.weight",
)
GGUF_NAMES = replace(
    GGUF,
    post_attention_norm="blk.{}.post_attention_norm.weight",
    post_mlp_norm="blk.{}.post_ffw_norm.weight",
)


def describe(checkpoint: Checkpoint) -> tuple[DecoderConfig, WeightNames]:
    if checkpoint.format == "gguf":
        return _from_gguf(checkpoint), GGUF_NAMES
    return _from_huggingface(checkpoint), HUGGINGFACE_NAMES


def _from_huggingface(checkpoint: Checkpoint) -> DecoderConfig:
    look = Lookup({**DEFAULTS, **checkpoint.metadata})
    look.refuse_if_set("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention")
    context, dim = look.whole("max_position_embeddings"), look.whole("head_dim")
    parameters = look.get("rope_parameters", {})
    local = parameters.get("sliding_attention") or {}
    wide = parameters.get("full_attention") or look.get("rope_scaling", {})
    local_rope = huggingface_rope(local, look.real("rope_local_base_freq"), dim, context)
    wide_rope = huggingface_rope(wide, look.real("rope_theta"), dim, context)
    config = from_huggingface(checkpoint, "gemma3", wide_rope, DEFAULTS)
    config = replace(config, attention_scale=look.real("query_pre_attn_scalar") ** -0.5, unit_offset_norms=True)
    count, pattern = len(config.layers), look.whole("sliding_window_pattern")
    kinds = look.get("layer_types") or ["full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(count)]
    if len(kinds) != count:
        raise UserError(f"the model's metadata has {len(kinds)} layer_types for {count} layers: the file is corrupt, get it anew")
    return _gemma(config, [kind == "sliding_attention" for kind in kinds], look.whole("sliding_window"), local_rope)


def _from_gguf(checkpoint: Checkpoint) -> DecoderConfig:
    config = from_gguf(checkpoint, "gemma3")
    look = Lookup(checkpoint.metadata, "gemma3.")
    count, pattern = len(config.layers), look.get("attention.sliding_window_pattern", PATTERN)
    sliding = list(pattern) if isinstance(pattern, list | tuple) else [(layer + 1) % pattern != 0 for layer in range(count)]
    window = look.get("attention.sliding_window", 0)
    if not window:
        sliding = [False] * count
    if count == _LAYERS_27B:
        config = replace(config, attention_scale=(config.hidden // config.heads) ** -0.5)
    local_rope = RopeConfig(plain_frequencies(look.real("rope.freq_base_swa", LOCAL_THETA), config.head_dim), interleaved=False)
    return _gemma(replace(config, activation="gelu_tanh"), sliding, window, local_rope)


def _gemma(config: DecoderConfig, sliding: list[bool], window: int, local_rope: RopeConfig) -> DecoderConfig:
    layers = tuple(LayerConfig(window, local_rope) if local else wide for wide, local in zip(config.layers, sliding, strict=True))
    return replace(config, layers=layers, qk_norm=True, sandwich_norms=True, embedding_scale=math.sqrt(config.hidden))
