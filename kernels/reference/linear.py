"""Linear layers: weights are dequantized to float32 once, products run in fixed tiles (see `tiles.py`)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from headrace.kernels.reference.tiles import pad_last, padded, product, trusted_tiles
from headrace.kernels.weights import GroupedInt, Weight

GROUP = 32
"""Inputs that are rounded to 8 bits with one scale."""


@dataclass(frozen=True, slots=True)
class PreparedLinear:
    matrix: torch.Tensor
    """float32 [K, N], both padded with zeros to multiples of 16; a transposed view of [N, K]."""
    bias: torch.Tensor | None
    """float32 [N], not padded."""
    outputs: int
    """N before padding."""
    inputs: int
    """K before padding."""
    tiles: tuple[int, ...]
    activations: str
    """What the inputs are rounded to first: "int8", "bf16", or "f32" where they are not."""


def prepare(weights: Sequence[Weight], bias: np.ndarray | None, device: torch.device, activations: str = "f32") -> PreparedLinear:
    """Stack the weights along N in float32. With other `activations`, inputs are rounded to these where all weights allow it, and with
    "bf16" so are the weights."""
    inputs = weights[0].shape[1]
    for weight in weights:
        if weight.shape[1] != inputs:
            raise ValueError(f"weights of {weight.shape[1]} and {inputs} inputs cannot be stacked")
    outputs = sum(weight.shape[0] for weight in weights)
    if bias is not None and tuple(bias.shape) != (outputs,):
        raise ValueError(f"a bias of shape {tuple(bias.shape)} does not fit {outputs} outputs")
    matrix = torch.zeros(padded(outputs), padded(inputs), dtype=torch.float32, device=device)
    for weight, rows in zip(weights, matrix[:outputs, :inputs].split([weight.shape[0] for weight in weights]), strict=True):
        rows.copy_(torch.from_numpy(np.require(weight.dequantize(), requirements="CW")))
    offsets = None if bias is None else torch.tensor(bias, dtype=torch.float32, device=device)
    if not all(takes(weight, activations) for weight in weights):
        activations = "f32"
    if activations == "bf16":
        matrix = narrowed(matrix)
    return PreparedLinear(matrix.t(), offsets, outputs, inputs, trusted_tiles(matrix.t()), activations)


def takes(weight: Weight, activations: str) -> bool:
    """Whether inputs are rounded for this weight: to 8 bits where it is of integers in groups that fit those of the inputs, to bfloat16
    also where it is that itself."""
    if weight.shape[1] % GROUP:
        return False
    if isinstance(weight, GroupedInt):
        return weight.group == GROUP // 2 or weight.group % GROUP == 0
    return activations == "bf16" and weight.dtype == "bfloat16"


def rounded(x: torch.Tensor) -> torch.Tensor:
    """x [T, K] with every GROUP inputs of a row rounded to the nearest of 255 steps, the largest of which is their highest magnitude."""
    grouped = x.unflatten(1, (-1, GROUP))
    highest = grouped.abs().amax(-1, keepdim=True)
    codes = torch.round(grouped * torch.where(highest > 0, 127.0 / highest, 0.0))
    return (codes * (highest / 127.0)).flatten(1)


def narrowed(x: torch.Tensor) -> torch.Tensor:
    """x [T, K] in float32 as bfloat16 has it, what is halfway between two of that rounded upwards in magnitude."""
    bits = torch.where(x.isnan(), torch.nan, x).view(torch.int32)
    return ((bits + 0x8000) & ~0xFFFF).view(torch.float32)


def linear(x: torch.Tensor, weight: PreparedLinear) -> torch.Tensor:
    """x [T, K] times the prepared weight, plus its bias: [T, N]."""
    if weight.activations == "int8":
        x = rounded(x)
    elif weight.activations == "bf16":
        x = narrowed(x)
    out = product(pad_last(x), weight.matrix, weight.tiles)[:, : weight.outputs]
    return out if weight.bias is None else out + weight.bias
