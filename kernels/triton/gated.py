"""Gated activations of the MLP (arXiv:2002.05202), and the plain sum: what is computed value by value."""

import math

import torch
import triton
import triton.language as tl

_BLOCK = 1024
_GELU_SLOPE = tl.constexpr(2.0 * math.sqrt(2.0 / math.pi))


@triton.jit
def gated_kernel(gate_up, Y, width, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_up + 2 * row * width + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + (2 * row + 1) * width + columns, mask=inside, other=0.0).to(tl.float32)
    # 0.5 * (1 + tanh(y)) is sigmoid(2y)
    inner = (gate * gate * gate * 0.044715 + gate) * _GELU_SLOPE if GELU else gate
    y = gate / (1.0 + tl.exp(-inner)) * up
    tl.store(Y + row * width + columns, y.to(Y.dtype.element_ty), mask=inside)


def gated(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """activation(gate) * up for the halves of gate_up [T, 2F]: [T, F]."""
    if activation not in ("silu", "gelu_tanh"):
        raise ValueError(f'activation "{activation}" is not known: use "silu" or "gelu_tanh"')
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    y = torch.empty(tokens, width, dtype=gate_up.dtype, device=gate_up.device)
    if tokens:
        gated_kernel[(tokens, triton.cdiv(width, _BLOCK))](gate_up, y, width, GELU=activation == "gelu_tanh", BLOCK=_BLOCK, num_warps=4)
    return y
