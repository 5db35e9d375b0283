"""A decoder described by data: everything in which the supported families differ.

A family file (`llama.py`, `qwen2.py`, …) turns a checkpoint's own metadata into a `DecoderConfig` and a `WeightNames`; `decoder.py`
reads nothing else.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """How positions become rotations.

    `inverse_frequencies` is float32 [D_rot / 2] with any scaling (linear, llama3, yarn, …) already in it;
    `attention_factor` multiplies cos and sin (yarn).
    """

    inverse_frequencies: np.ndarray
    interleaved: bool
    attention_factor: float = 1.0


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    """Many MLPs in place of one, of which each token takes a few."""

    count: int
    used: int
    """Experts of a token."""
    mlp: int
    """Width of each."""
    renormalize: bool
    """Whether the weights of a token's experts add up to 1; otherwise those of all experts would."""


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """What may differ from layer to layer."""

    window: int | None
    """Sliding window in tokens, None for full attention."""
    rope: RopeConfig
    experts: ExpertsConfig | None = None
    """None for one MLP."""


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    family: str
    vocab_size: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    context: int
    """Positions the checkpoint was made for."""
    norm_eps: float
    activation: str
    """"silu" or "gelu_tanh"."""
    attention_scale: float
    layers: tuple[LayerConfig, ...]
    qk_norm: bool = False
    sandwich_norms: bool = False
    """Norms after attention and after the MLP too, before each residual addition (Gemma)."""
    unit_offset_norms: bool = False
    """The file stores norm weights minus one (Gemma in Hugging Face's form)."""
    embedding_scale: float = 1.0
    tied_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    """A bias on the attention output projection."""
    mlp_bias: bool = False


@dataclass(frozen=True, slots=True)
class WeightNames:
    """The checkpoint's names. `{}` in a layer's name stands for the layer number, and a second one for the expert's: without it, one tensor
    [experts, N, K] holds the weights of all."""

    embedding: str
    final_norm: str
    head: str
    q: str
    k: str
    v: str
    o: str
    gate: str
    up: str
    down: str
    attention_norm: str
    mlp_norm: str
    q_norm: str = ""
    k_norm: str = ""
    post_attention_norm: str = ""
    post_mlp_norm: str = ""
    router: str = ""
    expert_gate_up: tuple[str, ...] = ()
    """What is stacked: gate and up, or one name for both."""
    expert_down: str = ""
