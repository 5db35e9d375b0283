"""Products with weights of grouped integers or of float8: codes are multiplied as they are, and a group's sum by its scale.

    codes [outputs, part] of a group ─exact─▶ type of x ┐
    x [T, K] ─transposed─▶ [part, tokens] ──────────────┴▶ dot ─▶ block [outputs, tokens]   (to the end of the group, or of STEP inputs)
    total += scale * block (+ minimum * the sum of these x)

Whole numbers below 2^8 and float8 are exact in every type of x, so that nothing is rounded but sums in float32: more exact than weights
that are dequantized to bfloat16 first, and less work where a group is long.
"""

import torch
import triton
import triton.language as tl
from triton.runtime import driver

from headrace.kernels.triton.products import Product, Tiles, columns_of, splits_of, store_product, tile_of
from headrace.kernels.triton.rounding import e4m3_value
from headrace.kernels.triton.tiles import precision_of
from headrace.kernels.triton.weights import STEP, DeviceWeight

_SUM_BLOCK = 1024


_TAKE_APART = tl.constexpr("""{
    .reg .b32 first, second, higher;
    prmt.b32 first, $4, 0, 0x4140;
    prmt.b32 second, $4, 0, 0x4342;
    lop3.b32 $0, first, 0x000F000F, 0x43004300, 0xEA;
    lop3.b32 $1, second, 0x000F000F, 0x43004300, 0xEA;
    shr.b32 higher, first, 4;
    lop3.b32 $2, higher, 0x000F000F, 0x43004300, 0xEA;
    shr.b32 higher, second, 4;
    lop3.b32 $3, higher, 0x000F000F, 0x43004300, 0xEA;
}""")
"""Four bytes to four bfloat16 of their lower halves and four of their higher ones, plus 128 each (PTX ISA, prmt and lop3)."""


@triton.jit
def halves(packed, LOW: tl.constexpr, DTYPE: tl.constexpr, NVIDIA: tl.constexpr):
    """The lower and the higher halves of bytes, plus LOW, as floats. Bits of 2^7 with a number in its lowest places are that bfloat16 plus
    the number."""
    if tl.bfloat16 == DTYPE:
        if NVIDIA:
            first, second = tl.inline_asm_elementwise(
                _TAKE_APART, "=r,=r,=r,=r,r", [packed], (tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
            )
        else:
            first = ((packed & 15).to(tl.int16) | 0x4300).to(DTYPE, bitcast=True)
            second = ((packed >> 4).to(tl.int16) | 0x4300).to(DTYPE, bitcast=True)
        return first + (LOW - 128.0), second + (LOW - 128.0)
    return ((packed & 15).to(tl.int32) + LOW).to(DTYPE), ((packed >> 4).to(tl.int32) + LOW).to(DTYPE)


@triton.jit
def group_values(values, k, outputs, N, K, GROUP: tl.constexpr, SPREAD: tl.constexpr):
    """Scales or minimums of the group that holds input k, of these outputs: float32. GROUP 0: there is one group."""
    if GROUP == 0:
        return tl.load(values + outputs // SPREAD).to(tl.float32)
    return tl.load(values + (tl.minimum(k, K - 1) // GROUP) * (N // SPREAD) + outputs // SPREAD).to(tl.float32)


@triton.jit(do_not_specialize=["T", "y_rows", "across"])
def grouped_kernel(
    X,
    W,
    scales,
    minimums,
    sums,
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
    stride,
    SPLIT: tl.constexpr,
    SPLITS: tl.constexpr,
    WHOLE: tl.constexpr,
    USED: tl.constexpr,
    NIBBLES: tl.constexpr,
    GROUP: tl.constexpr,
    SPREAD: tl.constexpr,
    LOW: tl.constexpr,
    MINIMUMS: tl.constexpr,
    BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    NVIDIA: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    STEP: tl.constexpr,
    PART: tl.constexpr,
):
    """See `Product` for what all kernels of products share. `stride` is what lies between rows of W."""
    output, tokens, sources, end, expert = tile_of(tiles, order, across, T, N, TOKENS, OUTPUTS, USED)
    outputs = output + tl.arange(0, OUTPUTS)
    # What is read twice at the edges is not stored.
    rows = tl.minimum(outputs, N - 1)
    w_rows = W + (expert * N + rows)[:, None] * stride
    x_rows = X + sources.to(tl.int64)[None, :] * K
    groups = tl.cdiv(K, GROUP) if GROUP else 1
    scales += expert * groups * (N // SPREAD)
    if MINIMUMS:
        minimums += expert * groups * (N // SPREAD)
    FOLD: tl.constexpr = min(GROUP, STEP) if GROUP else STEP
    first, last = splits_of(end, SPLITS, WHOLE, USED)
    total = tl.zeros([OUTPUTS, TOKENS], tl.float32)
    for split in range(first, last):
        acc = tl.zeros([OUTPUTS, TOKENS], tl.float32)
        for k in range(split * SPLIT, min(K, (split + 1) * SPLIT), STEP):
            for fold in tl.static_range(STEP // FOLD):
                at = k + fold * FOLD
                factor = group_values(scales, at, rows, N, K, GROUP, SPREAD)
                if MINIMUMS:
                    minimum = group_values(minimums, at, rows, N, K, GROUP, SPREAD)
                    sum = tl.load(sums + (at // FOLD) * T.to(tl.int64) + sources, mask=(sources < T) & (at < K), other=0.0)
                block = tl.zeros([OUTPUTS, TOKENS], tl.float32)
                for part in tl.static_range(FOLD // PART):
                    columns = at + part * PART + tl.arange(0, PART)
                    x = columns_of(x_rows, columns[:, None], K, EVEN)
                    if NIBBLES:
                        if (fold * FOLD // PART + part) % 2 == 0:
                            bytes = (at + part * PART) // 2 + tl.arange(0, PART)
                            packed = columns_of(w_rows, bytes[None, :], K // 2, EVEN)
                            w, higher = halves(packed, LOW, X.dtype.element_ty, NVIDIA)
                        else:
                            w = higher
                    else:
                        w = columns_of(w_rows, columns[None, :], K, EVEN)
                        if W.dtype.element_ty == tl.uint8:
                            w = e4m3_value(w)
                        w = w.to(x.dtype)
                    block = tl.dot(w, x, block, input_precision=PRECISION)
                acc = tl.fma(block, tl.broadcast_to(factor[:, None], [OUTPUTS, TOKENS]), acc)
                if MINIMUMS:
                    acc = tl.fma(
                        tl.broadcast_to(minimum[:, None], [OUTPUTS, TOKENS]), tl.broadcast_to(sum[None, :], [OUTPUTS, TOKENS]), acc
                    )
        total += acc
    store_product(Y, total, bias, outputs, tokens, end, first, y_rows, N, width, WHOLE, BIAS)


@triton.jit(do_not_specialize=["T"])
def sums_kernel(X, Y, T, K, FOLD: tl.constexpr, BLOCK: tl.constexpr):
    """Y[f, t]: the sum of the FOLD inputs from f * FOLD on of row t, float32."""
    token = tl.program_id(0).to(tl.int64)
    folds = tl.program_id(1) * (BLOCK // FOLD) + tl.arange(0, BLOCK // FOLD)
    columns = folds[:, None] * FOLD + tl.arange(0, FOLD)[None, :]
    x = tl.load(X + token * K + columns, mask=columns < K, other=0.0).to(tl.float32)
    tl.store(Y + folds.to(tl.int64) * T + token, tl.sum(x, 1), mask=folds * FOLD < K)


def multiply_grouped(x: torch.Tensor, w: DeviceWeight, y: torch.Tensor, width: int, tiles: Tiles | None) -> None:
    """x [T, K] times codes, scales and minimums, to Y, whose rows lie `width` apart."""
    product = Product.of(w, y, width, "grouped", STEP, x.dtype, tiles)
    fold, sums = min(w.group or STEP, STEP), None
    if w.minimums is not None:
        sums = torch.empty(triton.cdiv(w.inputs, fold), len(x), dtype=torch.float32, device=x.device)
        grid = (len(x), triton.cdiv(w.inputs, _SUM_BLOCK))
        sums_kernel[grid](x, sums, len(x), w.inputs, FOLD=fold, BLOCK=_SUM_BLOCK, num_warps=4)
    grouped_kernel[product.grid](
        x,
        w.values,
        w.scales,
        w.minimums,
        sums,
        w.bias,
        product.target,
        *product.sizes,
        w.values.shape[1],
        **product.options,
        NIBBLES=w.form == "nibbles",
        GROUP=w.group,
        SPREAD=w.spread,
        LOW=w.low,
        MINIMUMS=w.minimums is not None,
        EVEN=w.inputs % STEP == 0,
        PRECISION=precision_of(x.dtype),
        NVIDIA=driver.active.get_current_target().backend == "cuda",
        STEP=STEP,
        PART=w.part,
    )
    product.finish()
