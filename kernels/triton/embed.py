"""Rows of an embedding table by number, dequantized as they are looked up."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from headrace.kernels.triton.products import columns_of
from headrace.kernels.triton.rounding import e4m3_value
from headrace.kernels.triton.weights import DeviceWeight

_BLOCK = 512


@triton.jit
def embed_kernel(
    ids,
    W,
    scales,
    minimums,
    Y,
    rows,
    width,
    scale,
    FORM: tl.constexpr,
    GROUP: tl.constexpr,
    SPREAD: tl.constexpr,
    LOW: tl.constexpr,
    MINIMUMS: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(ids + token).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    if FORM == "floats":
        value = tl.load(W + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    else:
        if FORM == "nibbles":
            byte = tl.load(W + row * (width // 2) + columns // (2 * PART) * PART + columns % PART, mask=inside, other=0).to(tl.int32)
            code = (byte >> (columns // PART % 2 * 4) & 15) + LOW
        else:
            code = columns_of(W + row * width, columns, width, False)
            if W.dtype.element_ty == tl.uint8:
                code = e4m3_value(code)
        place = (columns // GROUP if GROUP else columns * 0).to(tl.int64) * (rows // SPREAD) + row // SPREAD
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
            w.outputs,
            w.inputs,
            scale,
            FORM=w.form,
            GROUP=w.group,
            SPREAD=w.spread,
            LOW=w.low,
            MINIMUMS=w.minimums is not None,
            PART=w.part,
            BLOCK=_BLOCK,
            num_warps=4,
        )
    return y
