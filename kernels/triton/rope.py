"""Rotary positions (arXiv:2104.09864), optional norms of q and k, and the write of k and v to their pages. A program a head of a token."""

import torch
import triton
import triton.language as tl

from headrace.kernels.ops import HeadShape
from headrace.kernels.reference.rope import Rope
from headrace.kernels.triton.pages import KVPages
from headrace.kernels.triton.rounding import e4m3_code, nearest_whole
from headrace.kernels.triton.step import StepTokens
from headrace.kernels.triton.tiles import power_of_two
from headrace.kernels.weights import LARGEST, SMALLEST

_MOST_INT8, _MOST_E4M3, _SMALLEST = tl.constexpr(LARGEST["int8"]), tl.constexpr(LARGEST["e4m3"]), tl.constexpr(SMALLEST)


@triton.jit
def rope_write_kv_kernel(
    QKV,
    cos,
    sin,
    q_norm,
    k_norm,
    positions,
    slots,
    Q,
    keys,
    values,
    scales,
    eps,
    QUERY_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    SCALED: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, BLOCK)
    inside = at < DIM
    row = QKV + (token * (QUERY_HEADS + 2 * KV_HEADS) + head) * DIM
    x = tl.load(row + at, mask=inside, other=0.0).to(tl.float32)
    if head < QUERY_HEADS + KV_HEADS:
        # What each value is rotated with, and whether it is the first of the pair.
        turned = at < 2 * HALF
        if INTERLEAVED:
            partner, pair, first = at ^ 1, at // 2, at % 2 == 0
        else:
            first = at < HALF
            partner, pair = tl.where(first, at + HALF, at - HALF), at % HALF
        other = tl.load(row + partner, mask=turned, other=0.0).to(tl.float32)
        inverse = 1.0 / tl.sqrt(tl.sum(x * x, 0) / DIM + eps)
        # What is known when this is compiled stands apart from what is not.
        if Q_NORM:  # noqa: SIM102
            if head < QUERY_HEADS:
                x = x * inverse * tl.load(q_norm + at, mask=inside, other=0.0)
                other = other * inverse * tl.load(q_norm + partner, mask=turned, other=0.0)
        if K_NORM:  # noqa: SIM102
            if head >= QUERY_HEADS:
                x = x * inverse * tl.load(k_norm + at, mask=inside, other=0.0)
                other = other * inverse * tl.load(k_norm + partner, mask=turned, other=0.0)
        angle = tl.load(positions + token).to(tl.int64) * HALF + pair
        c, s = tl.load(cos + angle, mask=turned, other=1.0), tl.load(sin + angle, mask=turned, other=0.0)
        x = tl.where(first, x * c - other * s, x * c + other * s)
    if head < QUERY_HEADS:
        tl.store(Q + (token * QUERY_HEADS + head) * DIM + at, x.to(Q.dtype.element_ty), mask=inside)
    else:
        slot = tl.load(slots + token)
        # A row that only fills up the batch has no slot.
        inside = inside & (slot >= 0)
        page, offset = (slot // PAGE).to(tl.int64), slot % PAGE
        is_key = head < QUERY_HEADS + KV_HEADS
        kv_head = tl.where(is_key, head - QUERY_HEADS, head - QUERY_HEADS - KV_HEADS)
        place = (page * KV_HEADS + kv_head) * PAGE + offset
        code = x
        if SCALED:
            largest = tl.max(tl.abs(x), 0)
            # NaN and infinity make a scale of NaN and codes of 0.
            finite = largest < float("inf")
            most: tl.constexpr = _MOST_INT8 if keys.dtype.element_ty == tl.int8 else _MOST_E4M3
            factor = tl.where(finite & (largest >= _SMALLEST), most / largest, 0.0)
            code = tl.where(finite, x * factor, 0.0)
            if keys.dtype.element_ty == tl.int8:
                code = nearest_whole(code)
            elif keys.dtype.element_ty == tl.uint8:
                code = e4m3_code(code)
            kind = tl.where(is_key, 0, 1)
            scale = tl.where(finite, largest / most, float("nan"))
            tl.store(scales + ((page * KV_HEADS + kv_head) * 2 + kind) * PAGE + offset, scale, mask=slot >= 0)
        if is_key:
            tl.store(keys + place * DIM + at, code.to(keys.dtype.element_ty), mask=inside)
        else:
            tl.store(values + place * DIM + at, code.to(values.dtype.element_ty), mask=inside)


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
    """q [T, Hq * D], normalized and rotated, in the type in which the pages are multiplied; k and v go to their slots."""
    count = qkv.shape[0]
    q = torch.empty(count, heads.query_heads * heads.dim, dtype=kv.multiplied_as, device=qkv.device)
    block = power_of_two(heads.dim)
    if count:
        rope_write_kv_kernel[(count, heads.query_heads + 2 * heads.kv_heads)](
            qkv,
            rope.cos,
            rope.sin,
            q_norm,
            k_norm,
            tokens.positions,
            tokens.slots,
            q,
            kv.keys,
            kv.values,
            kv.scales,
            eps,
            QUERY_HEADS=heads.query_heads,
            KV_HEADS=heads.kv_heads,
            DIM=heads.dim,
            HALF=rope.cos.shape[1],
            INTERLEAVED=rope.interleaved,
            Q_NORM=q_norm is not None,
            K_NORM=k_norm is not None,
            SCALED=kv.scales is not None,
            PAGE=kv.page_size,
            BLOCK=block,
            num_warps=1 if block <= 128 else 2,
        )
    return q
