"""Linear layers: y = x W^T + b, and the kernel for weights of floats. Those of integers and float8 are multiplied in `grouped.py`,
and in `scaled.py` with inputs in 8 bits.

    W [N, K] ───────────▶ [outputs, K_BLOCK] ┐
    x [T, K] ─transposed─▶ [K_BLOCK, tokens] ┴▶ dot ─▶ [outputs, tokens]

The weight is the first operand, so that few tokens make a narrow product and not a mostly empty one. K is cut into splits by the shape of
the weight alone. Each is summed up from nothing, and the sums are added in order: by one program where there are many tokens, or by the
programs of the splits and one more kernel where there are few. Both give the same bits.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from headrace.kernels.triton.grouped import multiply_grouped
from headrace.kernels.triton.products import Product, Tiles, columns_of, splits_of, store_product, tile_of
from headrace.kernels.triton.scaled import multiply_scaled
from headrace.kernels.triton.tiles import K_BLOCK, precision_of
from headrace.kernels.triton.weights import DeviceWeight


@triton.jit(do_not_specialize=["T", "y_rows", "across"])
def linear_kernel(
    X,
    W,
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
    SPLIT: tl.constexpr,
    SPLITS: tl.constexpr,
    WHOLE: tl.constexpr,
    USED: tl.constexpr,
    BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """See `Product` for what all kernels of products share."""
    output, tokens, sources, end, expert = tile_of(tiles, order, across, T, N, TOKENS, OUTPUTS, USED)
    outputs = output + tl.arange(0, OUTPUTS)
    # What is read twice at the edges is not stored.
    w_rows = W + (expert * N + tl.minimum(outputs, N - 1))[:, None] * K
    x_rows = X + sources.to(tl.int64)[None, :] * K
    first, last = splits_of(end, SPLITS, WHOLE, USED)
    total = tl.zeros([OUTPUTS, TOKENS], tl.float32)
    for split in range(first, last):
        acc = tl.zeros([OUTPUTS, TOKENS], tl.float32)
        for k in range(split * SPLIT, min(K, (split + 1) * SPLIT), INPUTS):
            columns = k + tl.arange(0, INPUTS)
            x = columns_of(x_rows, columns[:, None], K, EVEN)
            w = columns_of(w_rows, columns[None, :], K, EVEN)
            if W.dtype.element_ty == tl.float16 and X.dtype.element_ty == tl.bfloat16:
                # Activations may exceed what float16 holds.
                w = w.to(tl.bfloat16)
            acc = tl.dot(w, x.to(w.dtype), acc, input_precision=PRECISION)
        total += acc
    store_product(Y, total, bias, outputs, tokens, end, first, y_rows, N, width, WHOLE, BIAS)


def linear(x: torch.Tensor, parts: Sequence[DeviceWeight], out: torch.dtype) -> torch.Tensor:
    """x [T, K], contiguous, times the stacked weights [N, K] transposed, plus their biases: [T, N] of type `out`."""
    tokens, width = x.shape[0], sum(part.outputs for part in parts)
    y = torch.empty(tokens, width, dtype=out, device=x.device)
    begin = 0
    for part in parts:
        if tokens:
            multiply(x, part, y[:, begin:], width)
        begin += part.outputs
    return y


def multiply(x: torch.Tensor, w: DeviceWeight, y: torch.Tensor, width: int, tiles: Tiles | None = None) -> None:
    """x [T, K] times a weight of any form, to Y, whose rows lie `width` apart; or times those of experts, to the rows that `tiles` say."""
    if w.rounding is not None:
        multiply_scaled(x, w, y, width, tiles)
    elif w.form == "floats":
        _multiply_floats(x, w, y, width, tiles)
    else:
        multiply_grouped(x, w, y, width, tiles)


def _multiply_floats(x: torch.Tensor, w: DeviceWeight, y: torch.Tensor, width: int, tiles: Tiles | None) -> None:
    kind = "float32" if w.values.dtype == torch.float32 else "floats"
    product = Product.of(w, y, width, kind, K_BLOCK, w.values.dtype if kind == "float32" else x.dtype, tiles)
    linear_kernel[product.grid](
        x,
        w.values,
        w.bias,
        product.target,
        *product.sizes,
        **product.options,
        EVEN=w.inputs % K_BLOCK == 0,
        PRECISION=precision_of(w.values.dtype),
        INPUTS=K_BLOCK,
    )
    product.finish()
