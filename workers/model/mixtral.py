"""Mixtral (arXiv:2401.04088): Mistral's form with a mixture of experts in every layer, whose weights add up to 1.

Its GGUF files are of the "llama" architecture, which `llama.py` serves.
"""

from dataclasses import replace

from headrace.workers.loader import Checkpoint
from headrace.workers.model.config import DecoderConfig, WeightNames
from headrace.workers.model.experts import experts_of, huggingface_names, refuse_other_routing, with_experts
from headrace.workers.model.llama import from_huggingface, with_windows
from headrace.workers.model.metadata import Lookup
from headrace.workers.model.names import HUGGINGFACE

DEFAULTS = {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_local_experts": 8, "num_experts_per_tok": 2}
"""What keys that a config.json leaves out mean; a sliding_window that is not there means none."""

HUGGINGFACE_NAMES = replace(
    HUGGINGFACE,
    router="model.layers.{}.block_sparse_moe.gate.weight",
    expert_gate_up=("model.layers.{}.block_sparse_moe.experts.{}.w1.weight", "model.layers.{}.block_sparse_moe.experts.{}.w3.weight"),
    expert_down="model.layers.{}.block_sparse_moe.experts.{}.w2.weight",
)


def describe(checkpoint: Checkpoint) -> tuple[DecoderConfig, WeightNames]:
    look = Lookup({**DEFAULTS, **checkpoint.metadata})
    refuse_other_routing(look)
    config = from_huggingface(checkpoint, "mixtral", defaults=DEFAULTS)
    config = with_windows(config, [look.get("sliding_window")] * len(config.layers))
    experts = experts_of(look, "num_local_experts", "num_experts_per_tok", config.mlp, renormalize=True)
    config = with_experts(config, experts, lambda index: True)
    return config, huggingface_names(HUGGINGFACE_NAMES, checkpoint, config)
