"""Linear layers: weights are dequantized to float32 once, products run in fixed tiles (see `tiles.py`)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch

from headrace.kernels.reference.rounding import EIGHT_BITS, GROUP, narrowed, rounded
from headrace.kernels.reference.tiles import pad_last, padded, product, trusted_tiles
from headrace.kernels.weights import Dense, GroupedInt, InputRounding, Weight

Rounding = InputRounding | str | None
"""What inputs are rounded to first: as `InputRounding` says, "bf16", or None where they are not."""


@dataclass(frozen=True, slots=True)
class Part:
    """Outputs for which inputs are rounded alike."""

    matrix: torch.Tensor
    """float32 [K, N], both padded with zeros to multiples of 16; a transposed view of [N, K]."""
    outputs: int
    """N before padding."""
    tiles: tuple[int, ...]
    rounding: Rounding


@dataclass(frozen=True, slots=True)
class PreparedLinear:
    parts: tuple[Part, ...]
    """In the order of their outputs."""
    bias: torch.Tensor | None
    """float32 [N], not padded."""

    @property
    def outputs(self) -> int:
        """N."""
        return sum(part.outputs for part in self.parts)


def prepare(weights: Sequence[Weight], bias: np.ndarray | None, device: torch.device, activations: str = "f32") -> PreparedLinear:
    """Stack the weights along N in float32. `activations` says what inputs are rounded to for each weight that allows it: "int8", "bf16",
    which the weight then is too, or "auto": as the weight's own format asks, and to int8 where it does not say."""
    inputs = weights[0].shape[1]
    for weight in weights:
        if weight.shape[1] != inputs:
            raise ValueError(f"weights of {weight.shape[1]} and {inputs} inputs cannot be stacked")
    outputs = sum(weight.shape[0] for weight in weights)
    if bias is not None and tuple(bias.shape) != (outputs,):
        raise ValueError(f"a bias of shape {tuple(bias.shape)} does not fit {outputs} outputs")
    offsets = None if bias is None else torch.tensor(bias, dtype=torch.float32, device=device)
    runs = groupby(weights, lambda weight: rounding_for(weight, activations))
    return PreparedLinear(tuple(_part(list(alike), rounding, device) for rounding, alike in runs), offsets)


def rounding_for(weight: Weight, activations: str) -> Rounding:
    """What inputs are rounded to for this weight: to 8 bits where it is of integers in groups that fit those of the inputs, to bfloat16
    also where it is of float8 in such groups, or bfloat16 itself."""
    if activations == "auto" and weight.inputs is not None:
        return weight.inputs
    if activations == "f32" or weight.shape[1] % GROUP:
        return None
    if isinstance(weight, Dense):
        return "bf16" if activations == "bf16" and weight.dtype == "bfloat16" else None
    group = weight.group if isinstance(weight, GroupedInt) else math.gcd(weight.block[1], weight.shape[1])
    if group != GROUP // 2 and group % GROUP:
        return None
    if activations == "bf16":
        return "bf16"
    return EIGHT_BITS if isinstance(weight, GroupedInt) else None


def _part(weights: list[Weight], rounding: Rounding, device: torch.device) -> Part:
    outputs, inputs = sum(weight.shape[0] for weight in weights), weights[0].shape[1]
    matrix = torch.zeros(padded(outputs), padded(inputs), dtype=torch.float32, device=device)
    for weight, rows in zip(weights, matrix[:outputs, :inputs].split([weight.shape[0] for weight in weights]), strict=True):
        rows.copy_(torch.from_numpy(np.require(weight.dequantize(), requirements="CW")))
    if rounding == "bf16":
        matrix = narrowed(matrix)
    return Part(matrix.t(), outputs, trusted_tiles(matrix.t()), rounding)


def linear(x: torch.Tensor, weight: PreparedLinear) -> torch.Tensor:
    """x [T, K] times the prepared weight, plus its bias: [T, N]."""
    outs = []
    for part in weight.parts:
        if isinstance(part.rounding, InputRounding):
            taken = rounded(x, part.rounding)
        else:
            taken = x if part.rounding is None else narrowed(x)
        outs.append(product(pad_last(taken), part.matrix, part.tiles)[:, : part.outputs])
    out = outs[0] if len(outs) == 1 else torch.cat(outs, 1)
    return out if weight.bias is None else out + weight.bias
