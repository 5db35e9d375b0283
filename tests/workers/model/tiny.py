"""Tiny models of every family with random weights, as `transformers` saves them and as GGUF files of the same weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers

SIZES: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 72,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


EXPERTS = {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 56}


def rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **settings}}


LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=128)

MODELS: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama-tied-llama3-rope": lambda: transformers.LlamaConfig(**{**SIZES, **LLAMA3}, tie_word_embeddings=True),
    "llama-linear-rope": lambda: transformers.LlamaConfig(**{**SIZES, **rope("linear", factor=2.0)}),
    "llama-dynamic-rope": lambda: transformers.LlamaConfig(**{**SIZES, **rope("dynamic", factor=2.0)}),
    "llama-yarn-rope": lambda: transformers.LlamaConfig(**{**SIZES, **YARN}),
    "llama-with-every-bias": lambda: transformers.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama-one-kv-head": lambda: transformers.LlamaConfig(
        **{**SIZES, "num_attention_heads": 5, "num_key_value_heads": 1, "hidden_size": 80, "num_hidden_layers": 2}, head_dim=24
    ),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=20, head_dim=16),
    "mistral-without-window": lambda: transformers.MistralConfig(**SIZES, sliding_window=None),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen2-window-above-layer-1": lambda: transformers.Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=24, max_window_layers=1
    ),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=False),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(**SIZES, head_dim=32, **EXPERTS, norm_topk_prob=True, tie_word_embeddings=False),
    "qwen3-moe-in-some-layers": lambda: transformers.Qwen3MoeConfig(
        **{**SIZES, "num_hidden_layers": 4}, head_dim=32, **EXPERTS, norm_topk_prob=False, decoder_sparse_step=2, mlp_only_layers=[3]
    ),
    "qwen3-moe-with-window": lambda: transformers.Qwen3MoeConfig(
        **SIZES, head_dim=32, **EXPERTS, norm_topk_prob=True, use_sliding_window=True, sliding_window=24
    ),
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, num_local_experts=5, num_experts_per_tok=2),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **{**SIZES, "num_hidden_layers": 7}, head_dim=32, query_pre_attn_scalar=24, sliding_window=20
    ),
    "gemma3-scaled-global-rope": lambda: transformers.Gemma3TextConfig(
        **{**SIZES, "num_hidden_layers": 6},
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=33,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
}


def build(name: str, directory: Path, as_published: bool = True) -> transformers.PreTrainedModel:
    """The model `name` in float32, saved to `directory`, as such models are published or in transformers' own form; norms and biases are
    random too."""
    torch.manual_seed(sum(name.encode()))
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name](), dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(directory, save_original_format=as_published)
    return model


ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
}

MERGED = {"gate_up_proj": ("gate_proj", "up_proj")}
"""What transformers holds as one tensor and GGUF files as two."""


def write_gguf(model: transformers.PreTrainedModel, path: Path) -> str:
    """Write the model as llama.cpp's converter lays it out; returns the architecture."""
    config = model.config
    kind = ARCHITECTURES[config.model_type]
    architecture = gguf.MODEL_ARCH_NAMES[kind]
    writer = gguf.GGUFWriter(path, architecture)
    write_metadata(writer, config)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.float().numpy()
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            values = interleave(values, heads)
        if architecture == "gemma3" and name.endswith("norm.weight"):
            values = values + 1
        prefix, _, last = name.rpartition(".")
        if last in MERGED:
            parts = zip(MERGED[last], np.split(values, 2, 1), strict=True)
        else:
            parts = [(last, values)]
        for part, some in parts:
            mapped = names.get_name(f"{prefix}.{part}", try_suffixes=(".weight", ".bias"))
            assert mapped, name
            writer.add_tensor(mapped if mapped.endswith((".weight", ".bias")) else f"{mapped}.weight", np.ascontiguousarray(some))
    if config_rope(config)["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_divisors(model))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return architecture


def config_rope(config: Any) -> dict[str, Any]:
    return config.rope_parameters.get("full_attention", config.rope_parameters)


def write_metadata(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if config.model_type in ("llama", "mixtral"):
        writer.add_rope_dimension_count(head_dim)
    if head_dim * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if (window := getattr(config, "sliding_window", None)) is not None:
        writer.add_sliding_window(window)
    if (experts := getattr(config, "num_local_experts", None)) is not None:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        if config.model_type == "qwen3_moe":
            writer.add_expert_feed_forward_length(config.moe_intermediate_size)
            if not config.norm_topk_prob:
                writer.add_expert_weights_norm(False)
    settings = config_rope(config)
    writer.add_rope_freq_base(settings["rope_theta"])
    if settings["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(settings["rope_type"]))
        writer.add_rope_scaling_factor(settings["factor"])
        if original := settings.get("original_max_position_embeddings"):
            writer.add_rope_scaling_orig_ctx_len(original)


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k so that value i of a head's first half stands before value i of its second."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def llama3_divisors(model: Any) -> np.ndarray:
    head_dim = model.config.hidden_size // model.config.num_attention_heads
    plain = 1.0 / (config_rope(model.config)["rope_theta"] ** (torch.arange(0, head_dim, 2).float() / head_dim))
    return (plain / model.model.rotary_emb.inv_freq).numpy()
