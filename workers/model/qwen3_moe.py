"""Qwen3 with mixtures of experts: Qwen3's form, but for the MLPs of most or all layers.

GGUF files call it "qwen3moe" and say nothing of weights that add up to 1, which all its models ask for.
"""

from dataclasses import replace

from headrace.workers.loader import Checkpoint
from headrace.workers.model.config import DecoderConfig, WeightNames
from headrace.workers.model.experts import experts_of, gguf_names, huggingface_names, refuse_other_routing, with_experts
from headrace.workers.model.llama import from_gguf, from_huggingface, with_windows
from headrace.workers.model.metadata import Lookup
from headrace.workers.model.names import HUGGINGFACE

DEFAULTS = {
    "num_key_value_heads": 4,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "sliding_window": 4096,
}
"""What keys that a config.json leaves out mean. The number of experts has two names; it is 128."""

HUGGINGFACE_NAMES = replace(
    HUGGINGFACE,
    router="model.layers.{}.mlp.gate.weight",
    expert_gate_up=("model.layers.{}.mlp.experts.{}.gate_proj.weight", "model.layers.{}.mlp.experts.{}.up_proj.weight"),
    expert_down="model.layers.{}.mlp.experts.{}.down_proj.weight",
)


def describe(checkpoint: Checkpoint) -> tuple[DecoderConfig, WeightNames]:
    if checkpoint.format == "gguf":
        config = replace(from_gguf(checkpoint, "qwen3_moe"), qk_norm=True)
        return config, gguf_names(checkpoint, config)
    config = _from_huggingface(checkpoint)
    return config, huggingface_names(HUGGINGFACE_NAMES, checkpoint, config)


def _from_huggingface(checkpoint: Checkpoint) -> DecoderConfig:
    metadata = {**DEFAULTS, **checkpoint.metadata}
    look = Lookup({**metadata, "num_experts": metadata.get("num_experts") or metadata.get("num_local_experts") or 128})
    refuse_other_routing(look)
    config = replace(from_huggingface(checkpoint, "qwen3_moe", defaults=DEFAULTS), qk_norm=True)
    window = look.whole("sliding_window") if look.get("use_sliding_window", False) else None
    config = with_windows(config, [window] * len(config.layers))
    mlp, renormalize = look.whole("moe_intermediate_size"), bool(look.get("norm_topk_prob"))
    experts = experts_of(look, "num_experts", "num_experts_per_tok", mlp, renormalize)
    step, plain = look.whole("decoder_sparse_step"), look.get("mlp_only_layers", [])
    return with_experts(config, experts, lambda index: index not in plain and (index + 1) % step == 0)
