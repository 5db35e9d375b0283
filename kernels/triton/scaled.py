"""Products of 8-bit weights with inputs that are rounded to 8 bits first, as the weight's format asks: float8 e4m3, and int8.

    x [T, K] ─▶ round_kernel ─▶ codes [T, K], scales [groups, T] ┐
    weight codes [N, K], scales [groups, N] ─────────────────────┴▶ dot of STEP inputs ─▶ block [outputs, tokens]

    scales by groups of inputs     acc += block * (scale of weight * scale of input)      after each STEP
    one scale a row                acc += block * scale of weight, and at the end of a split times the scale of input

Sums of int8 are exact. Hopper's tensor cores keep about 14 bits while they add up float8 (arXiv:2412.19437, section 3.3.2), so no more than
STEP products are added there. Cards without float8 multiply the same values as bfloat16.
"""

import torch
import triton
import triton.language as tl

from headrace.kernels.triton.products import Product, Tiles, columns_of, splits_of, store_product, tile_of
from headrace.kernels.triton.rounding import e4m3_value, nearest_e4m3, nearest_whole
from headrace.kernels.triton.weights import STEP, DeviceWeight
from headrace.kernels.weights import LARGEST, SMALLEST, InputRounding

_ROUND_BLOCK = 1024


@triton.jit
def round_kernel(
    X,
    codes,
    scales,
    T,
    K,
    static,
    largest,
    smallest,
    GROUP: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
    STATIC: tl.constexpr,
    E4M3: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`InputRounding` of a group of a row, or of a whole row: codes [T, K], and scales [groups, T] where they are not static."""
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin = group * GROUP
    end = K if WHOLE_ROW else tl.minimum(begin + GROUP, K)
    if STATIC:
        factor = tl.div_rn(1.0, static)
    else:
        highest = tl.zeros([BLOCK], tl.float32)
        odd = tl.zeros([BLOCK], tl.int32)
        for at in range(begin, end, BLOCK):
            columns = at + tl.arange(0, BLOCK)
            x = tl.abs(tl.load(X + token * K + columns, mask=columns < end, other=0.0).to(tl.float32))
            odd |= ((x == float("inf")) | (x != x)).to(tl.int32)
            highest = tl.maximum(highest, x)
        top = tl.max(highest, 0)
        odd_one = tl.max(odd, 0) > 0
        small = top < smallest
        factor = tl.where(odd_one | small, 0.0, tl.div_rn(largest, tl.where(odd_one | small, 1.0, top)))
        scale = tl.where(odd_one, float("nan"), tl.where(small, 0.0, tl.div_rn(top, largest)))
        tl.store(scales + group * T + token, scale)
    for at in range(begin, end, BLOCK):
        columns = at + tl.arange(0, BLOCK)
        x = tl.load(X + token * K + columns, mask=columns < end, other=0.0).to(tl.float32) * factor
        if not STATIC:
            # Infinity times 0.
            x = tl.where(odd_one, 0.0, x)
        if E4M3:
            if STATIC:
                x = tl.where(x != x, x, tl.minimum(tl.maximum(x, -largest), largest))
            if codes.dtype.element_ty == tl.bfloat16:
                x = nearest_e4m3(x)
        else:
            x = nearest_whole(tl.minimum(tl.maximum(x, -128.0), 127.0))
        tl.store(codes + token * K + columns, x.to(codes.dtype.element_ty), mask=columns < end)


@triton.jit(do_not_specialize=["T", "y_rows", "across"])
def scaled_kernel(
    X,
    W,
    x_scales,
    w_scales,
    bias,
    Y,
    T,
    N,
    K,
    width,
    y_rows,
    across,
    tiles,
    order,
    static,
    SPLIT: tl.constexpr,
    SPLITS: tl.constexpr,
    WHOLE: tl.constexpr,
    USED: tl.constexpr,
    X_GROUP: tl.constexpr,
    W_GROUP: tl.constexpr,
    SPREAD: tl.constexpr,
    STATIC: tl.constexpr,
    BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    STEP: tl.constexpr,
):
    """See `Product` for what all kernels of products share. X_GROUP and W_GROUP: inputs that share a scale, 0 for all of a row;
    SPREAD: outputs that share one."""
    output, tokens, sources, end, expert = tile_of(tiles, order, across, T, N, TOKENS, OUTPUTS, USED)
    outputs = output + tl.arange(0, OUTPUTS)
    # What is read twice at the edges is not stored.
    rows = tl.minimum(outputs, N - 1)
    w_rows = W + (expert * N + rows)[:, None] * K
    x_rows = X + sources.to(tl.int64)[None, :] * K
    w_scales += expert * (tl.cdiv(K, W_GROUP) if W_GROUP else 1) * (N // SPREAD)
    GROUPED: tl.constexpr = X_GROUP != 0 or W_GROUP != 0
    WHOLE_NUMBERS: tl.constexpr = X.dtype.element_ty == tl.int8
    SUM: tl.constexpr = tl.int32 if WHOLE_NUMBERS else tl.float32
    first, last = splits_of(end, SPLITS, WHOLE, USED)
    total = tl.zeros([OUTPUTS, TOKENS], tl.float32)
    if W_GROUP == 0:
        w_scale = tl.load(w_scales + rows)[:, None]
    if X_GROUP == 0:
        x_scale = tl.zeros([TOKENS], tl.float32) + static if STATIC else tl.load(x_scales + sources)
    for split in range(first, last):
        acc = tl.zeros([OUTPUTS, TOKENS], tl.float32 if GROUPED else SUM)
        for k in range(split * SPLIT, min(K, (split + 1) * SPLIT), STEP):
            if W_GROUP != 0:
                if SPREAD % OUTPUTS == 0:
                    w_scale = tl.load(w_scales + (k // W_GROUP) * (N // SPREAD) + output // SPREAD)
                else:
                    w_scale = tl.load(w_scales + (k // W_GROUP) * (N // SPREAD) + rows // SPREAD)[:, None]
            if X_GROUP != 0:
                x_scale = tl.load(x_scales + (k // X_GROUP) * T.to(tl.int64) + sources)
            columns = k + tl.arange(0, STEP)
            x = columns_of(x_rows, columns[:, None], K, EVEN)
            w = columns_of(w_rows, columns[None, :], K, EVEN)
            if X.dtype.element_ty == tl.bfloat16:
                w = e4m3_value(w).to(tl.bfloat16)
            if WHOLE_NUMBERS and not GROUPED:
                acc = tl.dot(w, x, acc, out_dtype=tl.int32)
            else:
                block = tl.dot(w, x, out_dtype=SUM).to(tl.float32)
                # A plain sum would be made part of the next product, and lose bits there: what is the weight's is multiplied here.
                acc = tl.fma(block, w_scale * x_scale[None, :] if GROUPED else tl.broadcast_to(w_scale, [OUTPUTS, TOKENS]), acc)
        if not GROUPED:
            # Rounded before it is added, as where each split has a program of its own: plain, it would be added as it is.
            factor = w_scale * x_scale[None, :] if WHOLE_NUMBERS else tl.broadcast_to(x_scale[None, :], [OUTPUTS, TOKENS])
            acc = tl.fma(acc.to(tl.float32), factor, tl.zeros([OUTPUTS, TOKENS], tl.float32))
        total += acc
    store_product(Y, total, bias, outputs, tokens, end, first, y_rows, N, width, WHOLE, BIAS)


def round_inputs(x: torch.Tensor, rounding: InputRounding, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Codes [T, K] of x [T, K] as `dtype`, and float32 scales [groups, T]; none where the scale is static."""
    tokens, inputs = x.shape
    groups = 1 if rounding.group is None else triton.cdiv(inputs, rounding.group)
    codes = torch.empty(x.shape, dtype=dtype, device=x.device)
    scales = None if rounding.scale is not None else torch.empty(groups, tokens, dtype=torch.float32, device=x.device)
    round_kernel[(tokens, groups)](
        x,
        codes,
        scales,
        tokens,
        inputs,
        rounding.scale or 0.0,
        LARGEST[rounding.kind],
        SMALLEST,
        GROUP=rounding.group or 0,
        WHOLE_ROW=rounding.group is None,
        STATIC=rounding.scale is not None,
        E4M3=rounding.kind == "e4m3",
        BLOCK=_ROUND_BLOCK if rounding.group is None else rounding.group,
        num_warps=4 if rounding.group is None else 1,
    )
    return codes, scales


def multiply_scaled(x: torch.Tensor, w: DeviceWeight, y: torch.Tensor, width: int, tiles: Tiles | None) -> None:
    """x [T, K], rounded, times a weight of bytes or e4m3 that says how, to Y, whose rows lie `width` apart."""
    assert w.rounding is not None, "a weight that is multiplied in 8 bits says how its inputs are rounded"
    if w.form == "bytes":
        kind = torch.int8
    else:
        # Without float8 the weight is bytes, and its inputs have its values as bfloat16.
        kind = torch.bfloat16 if w.values.dtype == torch.uint8 else torch.float8_e4m3fn
    codes, scales = round_inputs(x, w.rounding, kind)
    product = Product.of(w, y, width, "int8" if w.form == "bytes" else "e4m3", STEP, kind, tiles)
    scaled_kernel[product.grid](
        codes,
        w.values,
        scales,
        w.scales,
        w.bias,
        product.target,
        *product.sizes,
        w.rounding.scale or 0.0,
        **product.options,
        X_GROUP=w.rounding.group or 0,
        W_GROUP=w.group,
        SPREAD=w.spread,
        STATIC=w.rounding.scale is not None,
        EVEN=w.inputs % STEP == 0,
        STEP=STEP,
    )
    product.finish()
