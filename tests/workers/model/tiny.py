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


def build(name: str, directory: Path) -> transformers.PreTrainedModel:
    """The model `name` in float32, saved to `directory`; norms and biases are random too."""
    torch.manual_seed(sum(name.encode()))
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name](), dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    return model


ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
}


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
        mapped = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert mapped, name
        writer.add_tensor(mapped, np.ascontiguousarray(values))
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
    if config.model_type == "llama":
        writer.add_rope_dimension_count(head_dim)
    if head_dim * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if (window := getattr(config, "sliding_window", None)) is not None:
        writer.add_sliding_window(window)
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
