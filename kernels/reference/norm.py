"""Root-mean-square normalization (arXiv:1910.07467)."""

import torch

from headrace.kernels.reference.exact import row_sum


def rmsnorm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension, for x of any shape [..., H]."""
    mean = row_sum(x * x) / x.shape[-1]
    return x / mean.add_(eps).sqrt_() * weight
