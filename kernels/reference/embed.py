"""Rows of an embedding table by number, dequantized as they are looked up."""

from dataclasses import dataclass

import torch

from headrace.kernels.weights import Weight


@dataclass(frozen=True, slots=True)
class Table:
    """A table [V, H] as it is stored, whose rows go to `device`."""

    weight: Weight
    device: torch.device


def embed(ids: torch.Tensor, table: Table, scale: float) -> torch.Tensor:
    """Rows `ids` (int32 [T]) of the table, times `scale`: float32 [T, H]."""
    values = torch.from_numpy(table.weight.take(ids.cpu().numpy()).dequantize()).to(table.device)
    return values if scale == 1.0 else values * scale
