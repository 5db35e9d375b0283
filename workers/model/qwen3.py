"""Qwen3 (dense): Qwen2's form without biases, each head of q and k normalized before it is rotated, and a head size of its own."""

from dataclasses import replace

from headrace.workers.loader import Checkpoint
from headrace.workers.model.config import DecoderConfig, WeightNames
from headrace.workers.model.llama import from_gguf, from_huggingface, with_windows
from headrace.workers.model.names import GGUF, HUGGINGFACE
from headrace.workers.model.qwen2 import windows

DEFAULTS = {"head_dim": 128}
"""What a config.json without head_dim means: not hidden_size / num_attention_heads, as elsewhere."""


def describe(checkpoint: Checkpoint) -> tuple[DecoderConfig, WeightNames]:
    if checkpoint.format == "gguf":
        return replace(from_gguf(checkpoint, "qwen3"), qk_norm=True), GGUF
    config = from_huggingface(checkpoint, "qwen3", defaults=DEFAULTS)
    return replace(with_windows(config, windows(checkpoint.metadata, len(config.layers))), qk_norm=True), HUGGINGFACE
