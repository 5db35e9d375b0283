"""Rows by number: of an embedding table, dequantized as they are looked up, or of activations."""

import torch

from headrace.kernels.weights import Weight


def embed(ids: torch.Tensor, table: Weight, scale: float) -> torch.Tensor:
    """Rows `ids` (int32 [T]) of the table [V, H], times `scale`: float32 [T, H]."""
    values = table.take(ids).dequantize()
    return values if scale == 1.0 else values * scale


def rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x[index] for int32 index [B]: [B, H]."""
    return x.index_select(0, index)
