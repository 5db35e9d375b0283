"""What files say of mixtures of experts, and under which names their weights lie.

    one tensor an expert   Hugging Face as published, GGUF before 2024
    [experts, N, K]        GGUF, and what transformers writes when it keeps its own form, gate and up stacked along N

Kept to what is built: a softmax chooses, and nothing but the chosen experts is added up.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from headrace.workers.loader import Checkpoint
from headrace.workers.model.config import DecoderConfig, ExpertsConfig, WeightNames
from headrace.workers.model.metadata import Lookup
from headrace.workers.model.names import GGUF

STACKED = {
    "router": "model.layers.{}.mlp.gate.weight",
    "expert_gate_up": ("model.layers.{}.mlp.experts.gate_up_proj",),
    "expert_down": "model.layers.{}.mlp.experts.down_proj",
}
"""Names of transformers' own form, in every family."""

_SOFTMAX = (0, 1)
"""`expert_gating_func` of a GGUF file: not said, and the softmax."""


def with_experts(config: DecoderConfig, experts: ExpertsConfig, has: Callable[[int], bool]) -> DecoderConfig:
    """The config with experts in the layers that have them."""
    layers = (replace(layer, experts=experts) if has(index) else layer for index, layer in enumerate(config.layers))
    return replace(config, layers=tuple(layers))


def experts_of(look: Lookup, count: str, used: str, mlp: int, renormalize: bool) -> ExpertsConfig:
    """From the keys of the two numbers. UserError for what they cannot be."""
    experts = ExpertsConfig(look.whole(count), look.whole(used), mlp, renormalize)
    if experts.used > experts.count:
        raise look.refused(used, experts.used, f"there are {experts.count} experts")
    return experts


def refuse_other_routing(look: Lookup) -> None:
    """UserError for what a config.json of such a model may ask for beside its family's form."""
    look.refuse_if_set("shared_expert_intermediate_size", "n_shared_experts", "num_shared_experts", "use_expert_bias", "moe_layer_pattern")
    if (scoring := look.get("scoring_func", "softmax")) != "softmax":
        raise look.refused("scoring_func", scoring, 'experts are chosen by "softmax" alone')
    for key in ("n_group", "topk_group", "routed_scaling_factor"):
        if (value := look.get(key, 1)) != 1:
            raise look.refused(key, value, "this is not supported")


def huggingface_names(names: WeightNames, checkpoint: Checkpoint, config: DecoderConfig) -> WeightNames:
    """`names`, or those of transformers' own form where that is what the files are in."""
    stacked = any(STACKED["expert_down"].format(index) in checkpoint for index in _layers(config))
    return replace(names, **STACKED) if stacked else names


def gguf_experts(checkpoint: Checkpoint, look: Lookup, config: DecoderConfig) -> DecoderConfig:
    """The config with what the file says of experts; itself where that is nothing."""
    if not look.get("expert_count"):
        return config
    look.refuse_if_set("expert_shared_count", "expert_shared_feed_forward_length")
    if (gating := look.get("expert_gating_func", _SOFTMAX[0])) not in _SOFTMAX:
        raise look.refused("expert_gating_func", gating, f"experts are chosen by a softmax ({_SOFTMAX[1]}) alone")
    for key in ("expert_group_count", "expert_group_used_count", "expert_weights_scale"):
        if (value := look.get(key, 0)) not in (0, 1):
            raise look.refused(key, value, "this is not supported")
    mlp = look.whole("expert_feed_forward_length", config.mlp)
    experts = experts_of(look, "expert_count", "expert_used_count", mlp, look.get("expert_weights_norm", True))
    return with_experts(config, experts, lambda index: GGUF.router.format(index) in checkpoint)


def gguf_names(checkpoint: Checkpoint, config: DecoderConfig) -> WeightNames:
    """Those of all experts' tensors, or in older files of each expert's."""
    older = replace(GGUF, expert_gate_up=("blk.{}.ffn_gate.{}.weight", "blk.{}.ffn_up.{}.weight"), expert_down="blk.{}.ffn_down.{}.weight")
    return older if any(older.expert_down.format(index, 0) in checkpoint for index in _layers(config)) else GGUF


def _layers(config: DecoderConfig) -> Sequence[int]:
    return [index for index, layer in enumerate(config.layers) if layer.experts]
