"""Sums and exponentials that are the same bits everywhere.

torch's own `sigmoid` and `silu` run vector code on most of an array and scalar code on its tail, which differ in the last bit, and
its `sum` picks an order from shape and thread count, so a row's result would depend on the array around it. What stands here is
composed of single additions, products, divisions and comparisons. Each of those is rounded as IEEE 754 says, whichever instruction
computes it, so that the results depend on their own inputs by construction: on any device, for any shape, with any number of threads.
"""

import torch

LOG2_E = 1.4426950408889634
LN2_HIGH = 0.693359375
"""Leading bits of ln 2: its product with a whole number below 2^14 is exact in float32."""
LN2_LOW = -2.12194440e-4
POLYNOMIAL = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
"""(e^r - 1 - r) / r² on |r| ≤ ln(2)/2, highest power first (the coefficients of the Cephes library's expf)."""
LOWEST, HIGHEST = -87.0, 88.0


def exp(x: torch.Tensor) -> torch.Tensor:
    """e^x for float32 x of any shape, within 2 units in the last place.

    Exactly 1 at 0, exactly 0 below -87 (minus infinity included), e^88 above 88; NaN stays NaN.
    """
    clamped = x.clamp(LOWEST, HIGHEST)
    whole = (clamped * LOG2_E).round_()
    rest = clamped.sub_(whole * LN2_HIGH).sub_(whole * LN2_LOW)
    value = rest * POLYNOMIAL[0]
    for coefficient in POLYNOMIAL[1:]:
        value.add_(coefficient).mul_(rest)
    value.mul_(rest).add_(rest).add_(1.0)
    # 2^whole, written into the exponent bits
    power = whole.to(torch.int32).add_(127).bitwise_left_shift_(23).view(torch.float32)
    return value.mul_(power).masked_fill_(x < LOWEST, 0.0)


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    """1 / (1 + e^-x)."""
    return exp(-x).add_(1.0).reciprocal_()


def row_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum over the last dimension, kept with size 1: the second half is added onto the first until one is left.

    An odd element out waits for the next round, so the order depends on the length of the row alone.
    """
    while (length := x.shape[-1]) > 1:
        half = length // 2
        folded = x[..., :half] + x[..., half : 2 * half]
        x = torch.cat((folded, x[..., 2 * half :]), -1) if length % 2 else folded
    return x
