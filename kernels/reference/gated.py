"""Gated activations of the MLP (arXiv:2002.05202)."""

import math

import torch

from headrace.kernels.reference.exact import sigmoid

_GELU_SLOPE = 2.0 * math.sqrt(2.0 / math.pi)


def gated(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """activation(gate) * up for the halves of gate_up [T, 2F]: [T, F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    if activation == "silu":
        return sigmoid(gate).mul_(gate).mul_(up)
    if activation == "gelu_tanh":
        # 0.5 * (1 + tanh(y)) is sigmoid(2y)
        inner = (gate * gate).mul_(gate).mul_(0.044715).add_(gate).mul_(_GELU_SLOPE)
        return sigmoid(inner).mul_(gate).mul_(up)
    raise ValueError(f'activation "{activation}" is not known: use "silu" or "gelu_tanh"')
