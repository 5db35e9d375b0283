"""Rotary frequencies: from a checkpoint's settings to a `RopeConfig`, and from that to the table the kernels read.

Scalings: "linear" (positions divided by a factor), "llama3" (long wavelengths only, with a ramp between), "yarn" (arXiv:2309.00071)
and, in GGUF files, a divisor for each frequency. "dynamic" changes the frequencies once a text outgrows the model's own context;
as a model is never served beyond it, there the plain ones hold. Others ("longrope", …) are refused by name.

Frequencies are float32 and computed in the order that `transformers` uses; powers are rounded from float64.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from headrace.engine.errors import UserError
from headrace.kernels.ops import RopeTable
from headrace.workers.loader import Checkpoint
from headrace.workers.model.config import RopeConfig
from headrace.workers.model.metadata import Lookup


def plain_frequencies(theta: float, dim: int) -> np.ndarray:
    """theta^(-2i / dim) for i < dim / 2, float32."""
    return np.float32(1) / _steps(theta, dim)


def _steps(theta: float, dim: int) -> np.ndarray:
    """theta^(2i / dim) for i < dim / 2, float32."""
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return np.power(theta, exponents.astype(np.float64)).astype(np.float32)


def llama3_frequencies(plain: np.ndarray, factor: float, low: float, high: float, original_context: float) -> np.ndarray:
    """Divide by `factor` where the wavelength exceeds original_context / low, ramping down to nothing at original_context / high."""
    wavelength = np.float32(2 * math.pi) / plain
    smooth = (original_context / wavelength - low) / (high - low)
    blended = (1 - smooth) * plain / factor + smooth * plain
    long, short = wavelength > original_context / low, wavelength < original_context / high
    return np.where(long, plain / factor, np.where(short, plain, blended)).astype(np.float32)


def yarn_frequencies(
    theta: float, dim: int, factor: float, original_context: float, fast: float = 32.0, slow: float = 1.0, whole: bool = True
) -> np.ndarray:
    """Divide by `factor` the frequencies that turn less than `slow` times in the original context, keep those that turn more than
    `fast` times, and ramp between, with the ramp's ends rounded outwards where `whole`."""

    def index_at(turns: float) -> float:
        return dim * math.log(original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = index_at(fast), index_at(slow)
    if whole:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low if high != low else 0.001), 0, 1)
    steps = _steps(theta, dim)
    kept = 1 - ramp
    return (1.0 / (factor * steps) * (1 - kept) + 1.0 / steps * kept).astype(np.float32)


def yarn_attention_factor(factor: float, weight: float = 1.0) -> float:
    """0.1 * weight * ln(factor) + 1 (arXiv:2309.00071, section 3.4)."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def huggingface_rope(settings: Mapping[str, Any], theta: float, dim: int, context: int) -> RopeConfig:
    """From `rope_parameters`, or the older `rope_scaling`. `context` is the config's max_position_embeddings."""
    look = Lookup(settings, "")
    kind = look.get("rope_type", look.get("type", "default"))
    theta = look.real("rope_theta", theta)
    if look.real("partial_rotary_factor", 1.0) != 1.0:
        raise look.refused("partial_rotary_factor", settings["partial_rotary_factor"], "heads rotated in part are not supported")
    plain = plain_frequencies(theta, dim)
    match kind:
        case "default" | "dynamic":
            return RopeConfig(plain, interleaved=False)
        case "linear":
            return RopeConfig(plain / np.float32(look.real("factor")), interleaved=False)
        case "llama3":
            original = look.real("original_max_position_embeddings", context)
            scaled = llama3_frequencies(plain, look.real("factor"), look.real("low_freq_factor"), look.real("high_freq_factor"), original)
            return RopeConfig(scaled, interleaved=False)
        case "yarn":
            original = look.real("original_max_position_embeddings", context)
            factor = look.real("factor", context / original)
            scaled = yarn_frequencies(
                theta, dim, factor, original, look.get("beta_fast") or 32, look.get("beta_slow") or 1, look.get("truncate", True)
            )
            attention = look.get("attention_factor")
            if attention is None:
                attention = yarn_attention_factor(factor)
                if (own := look.get("mscale")) and (all_dims := look.get("mscale_all_dim")):
                    attention = yarn_attention_factor(factor, own) / yarn_attention_factor(factor, all_dims)
            return RopeConfig(scaled, interleaved=False, attention_factor=float(attention))
    raise look.refused("rope_type", kind, "supported rope scalings are default, linear, dynamic, llama3 and yarn")


def gguf_rope(checkpoint: Checkpoint, look: Lookup, dim: int, interleaved: bool) -> RopeConfig:
    """From `rope.*` keys and the `rope_freqs.weight` divisors of a GGUF file."""
    theta = look.real("rope.freq_base", 10000.0)
    dim = look.whole("rope.dimension_count", dim)
    plain = plain_frequencies(theta, dim)
    if "rope_freqs.weight" in checkpoint:
        divisors = checkpoint.vector("rope_freqs.weight")
        if divisors.shape != plain.shape:
            raise UserError(f"rope_freqs.weight has {divisors.size} values for {plain.size} frequencies: the file is corrupt")
        plain = plain / divisors
    kind = look.get("rope.scaling.type", "linear" if look.get("rope.scaling.factor") or look.get("rope.scale_linear") else "none")
    match kind:
        case "none":
            return RopeConfig(plain, interleaved)
        case "linear":
            factor = look.real("rope.scaling.factor", look.get("rope.scale_linear", 1.0))
            return RopeConfig(plain / np.float32(factor), interleaved)
        case "yarn":
            factor = look.real("rope.scaling.factor")
            original = look.real("rope.scaling.original_context_length", look.whole("context_length"))
            fast, slow = look.real("rope.scaling.yarn_beta_fast", 32.0), look.real("rope.scaling.yarn_beta_slow", 1.0)
            scaled = yarn_frequencies(theta, dim, factor, original, fast, slow)
            attention = look.real("rope.scaling.attn_factor", 1.0) * yarn_attention_factor(factor)
            return RopeConfig(scaled, interleaved, attention)
    raise look.refused("rope.scaling.type", kind, "supported rope scalings are none, linear and yarn")


def rope_table(rope: RopeConfig, positions: int) -> RopeTable:
    """cos and sin of positions 0 … positions - 1."""
    angles = (np.arange(positions, dtype=np.float32)[:, None] * rope.inverse_frequencies).astype(np.float64)
    scale = np.float32(rope.attention_factor)
    return RopeTable(np.cos(angles).astype(np.float32) * scale, np.sin(angles).astype(np.float32) * scale, rope.interleaved)
