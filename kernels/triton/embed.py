"""Rows of an embedding table by number, dequantized as they are looked up."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from headrace.kernels.triton.linear import HALF, DeviceWeight

_BLOCK = 512


@triton.jit
def embed_kernel(
    ids,
    W,
    scales,
    minimums,
    Y,
    width,
    stride,
    scale,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    LOW: tl.constexpr,
    MINIMUMS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(ids + token).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    if BITS == 0:
        value = tl.load(W + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    else:
        if BITS == 4:
            byte = tl.load(W + row * stride + columns // (2 * HALF) * HALF + columns % HALF, mask=inside, other=0).to(tl.int32)
            code = (byte >> (columns // HALF % 2 * 4) & 15) + LOW
        else:
            code = tl.load(W + row * stride + columns, mask=inside, other=0).to(tl.int32)
        place = row * (width // GROUP) + columns // GROUP
        value = code.to(tl.float32) * tl.load(scales + place, mask=inside, other=0.0).to(tl.float32)
        if MINIMUMS:
            value += tl.load(minimums + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(Y + token * width + columns, value * scale, mask=inside)


def embed(ids: torch.Tensor, table: Sequence[DeviceWeight], scale: float) -> torch.Tensor:
    """Rows `ids` (int32 [T]) of the table [V, H], times `scale`: float32 [T, H]."""
    (w,) = table
    y = torch.empty(len(ids), w.inputs, dtype=torch.float32, device=ids.device)
    if len(ids):
        embed_kernel[(len(ids), triton.cdiv(w.inputs, _BLOCK))](
            ids,
            w.values,
            w.scales,
            w.minimums,
            y,
            w.inputs,
            w.values.shape[1],
            scale,
            BITS=w.bits,
            GROUP=w.group,
            LOW=w.low,
            MINIMUMS=w.minimums is not None,
            HALF=HALF,
            BLOCK=_BLOCK,
            num_warps=4,
        )
    return y
