"""Root-mean-square normalization (arXiv:1910.07467), with the sum of the residual stream where there is one. A program a row."""

import torch
import triton
import triton.language as tl

from headrace.kernels.triton.tiles import power_of_two


@triton.jit
def rmsnorm_kernel(X, residual, weight, total, Y, width, eps, RESIDUAL: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * width
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(X + row + columns, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        x = tl.load(residual + row + columns, mask=inside, other=0.0) + x
        tl.store(total + row + columns, x, mask=inside)
    mean = tl.sum(x * x, 0) / width
    y = x / tl.sqrt(mean + eps) * tl.load(weight + columns, mask=inside, other=0.0)
    tl.store(Y + row + columns, y.to(Y.dtype.element_ty), mask=inside)


def rmsnorm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.dtype) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) * weight for x [T, H], as type `out`."""
    y = torch.empty(x.shape, dtype=out, device=x.device)
    if len(x):
        block = power_of_two(x.shape[1])
        rmsnorm_kernel[(len(x),)](x, None, weight, None, y, x.shape[1], eps, RESIDUAL=False, BLOCK=block, num_warps=warps_of(block))
    return y


def add_rmsnorm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rmsnorm(residual + x) as type `out`, residual + x in float32), both [T, H]."""
    y, total = torch.empty(x.shape, dtype=out, device=x.device), torch.empty_like(residual)
    if len(x):
        block = power_of_two(x.shape[1])
        rmsnorm_kernel[(len(x),)](x, residual, weight, total, y, x.shape[1], eps, RESIDUAL=True, BLOCK=block, num_warps=warps_of(block))
    return y, total


def warps_of(block: int) -> int:
    """Warps for a row of so many values: the order of its sum follows from this and the width alone."""
    return min(16, max(1, block // 256))
