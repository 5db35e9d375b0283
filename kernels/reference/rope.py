"""Rotary positions (arXiv:2104.09864), optional norms of q and k, and the write of k and v to their pages."""

from dataclasses import dataclass

import torch

from headrace.kernels.ops import HeadShape
from headrace.kernels.reference.norm import rmsnorm
from headrace.kernels.reference.step import KVPages, StepTokens


@dataclass(frozen=True, slots=True)
class Rope:
    """`headrace.kernels.ops.RopeTable` on a device."""

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotate the first D_rot values of each head of x [T, heads, D]; cos and sin are [T, 1, D_rot / 2]."""
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., :half], turned[..., half:]
    pair = (first * cos - second * sin, second * cos + first * sin)
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned


def rope_write_kv(
    qkv: torch.Tensor,
    heads: HeadShape,
    rope: Rope,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    kv: KVPages,
    tokens: StepTokens,
) -> torch.Tensor:
    """Returns q [T, Hq * D], normalized and rotated; k and v go to their slots."""
    count = qkv.shape[0]
    shares = (heads.query_heads, heads.kv_heads, heads.kv_heads)
    q, k, v = qkv.view(count, sum(shares), heads.dim).split(shares, dim=1)
    if q_norm is not None:
        q = rmsnorm(q, q_norm, eps)
    if k_norm is not None:
        k = rmsnorm(k, k_norm, eps)
    cos = rope.cos.index_select(0, tokens.positions).unsqueeze(1)
    sin = rope.sin.index_select(0, tokens.positions).unsqueeze(1)
    kv.write(rotate(k, cos, sin, rope.interleaved), v, tokens.slots)
    return rotate(q, cos, sin, rope.interleaved).reshape(count, heads.query_heads * heads.dim)
