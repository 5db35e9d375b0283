"""Qwen2 and Qwen2.5: Llama's form with biases on q, k and v, and a sliding window in the upper layers where the config asks for it."""

from collections.abc import Mapping
from typing import Any

from headrace.workers.loader import Checkpoint
from headrace.workers.model.config import DecoderConfig, WeightNames
from headrace.workers.model.llama import from_gguf, from_huggingface, with_windows
from headrace.workers.model.metadata import Lookup
from headrace.workers.model.names import GGUF, HUGGINGFACE


def describe(checkpoint: Checkpoint) -> tuple[DecoderConfig, WeightNames]:
    if checkpoint.format == "gguf":
        return from_gguf(checkpoint, "qwen2"), GGUF
    config = from_huggingface(checkpoint, "qwen2")
    return with_windows(config, windows(checkpoint.metadata, len(config.layers))), HUGGINGFACE


def windows(metadata: Mapping[str, Any], layers: int) -> list[int | None]:
    """The window of each layer, from `layer_types`, or from `max_window_layers` in older files: the first layers that attend fully."""
    look = Lookup(metadata)
    if not look.get("use_sliding_window", False):
        return [None] * layers
    window = look.whole("sliding_window", 4096)
    if kinds := look.get("layer_types"):
        return [window if kind == "sliding_attention" else None for kind in kinds]
    full = look.get("max_window_layers", 28)
    return [window if layer >= full else None for layer in range(layers)]
