"""A linear layer's weight on a device, as its kernels want it.

    Dense        ─▶ floats            [N, K]
    GroupedInt   ─▶ nibbles or bytes  codes [N, K / 2] or [N, K], scales [groups, N]: neighbours in N lie side by side
    ScaledFloat  ─▶ e4m3              codes [N, K], scales [groups, N]

Nibbles: of 2 * part inputs that follow each other, the first `part` are the lower halves of bytes, the others the higher ones, so that
a tile of bytes is two tiles of codes. A weight whose format wants its inputs rounded to 8 bits may keep that wish (`rounding`): it is then
multiplied by `scaled.py`, any other by `grouped.py` or `linear.py`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import numpy as np
import torch

from headrace.kernels.weights import Dense, GroupedInt, InputRounding, ScaledFloat, Weight

FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

STEP = 128
"""Inputs that a kernel for integers takes at a time; where a group is not larger, it ends with them."""
LEAST_PART = 16
"""Inputs that a tensor core multiplies at once."""

SPREAD = 128
"""Outputs that may share a scale: no tile has more."""

Form = Literal["floats", "nibbles", "bytes", "e4m3"]


@dataclass(frozen=True, slots=True)
class DeviceWeight:
    """A weight [N, K] on a device, for products and for look-ups of its rows."""

    form: Form
    values: torch.Tensor
    """Floats [N, K], nibbles uint8 [N, K / 2], bytes int8 [N, K], or e4m3 [N, K]: float8_e4m3fn, or its bits in uint8 where a card knows
    no such type."""
    inputs: int
    """K."""
    bias: torch.Tensor | None = None
    """float32 [N]."""
    scales: torch.Tensor | None = None
    """[groups, N / spread], float16 where that is exact, else float32. None for floats."""
    minimums: torch.Tensor | None = None
    """Like the scales."""
    group: int = 0
    """Inputs that share a scale: a multiple of STEP, or a divisor of it from LEAST_PART on; 0 for all K."""
    spread: int = 1
    """Outputs that share a scale."""
    low: int = 0
    """What a nibble of 0 means."""
    rounding: InputRounding | None = None
    """How inputs are rounded to the weight's own kind of codes before they are multiplied."""
    experts: int = 1
    """How many such weights lie one behind the other, in all of these tensors."""

    @property
    def outputs(self) -> int:
        """N."""
        return self.values.shape[0] // self.experts

    @property
    def part(self) -> int:
        """Inputs that are multiplied at once, and that a row of nibbles has in the lower halves of as many bytes."""
        return part_of(self.form, self.group)


def part_of(form: Form, group: int) -> int:
    """`DeviceWeight.part`."""
    return min(group or STEP, STEP // 2 if form == "nibbles" else STEP)


def knows_float8(device: torch.device) -> bool:
    """Whether the device converts and multiplies e4m3fn: NVIDIA's do from Ada on, AMD's CDNA 3 has another type of that name."""
    if device.type != "cuda":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


def prepare(weights: Sequence[Weight], bias: np.ndarray | None, device: torch.device, rounds_inputs: bool = False) -> list[DeviceWeight]:
    """The weights on the device, those of one form stacked along N. With `rounds_inputs`, inputs are rounded where a format asks
    for it. ValueError for unequal inputs or a bias of another size."""
    inputs, outputs = weights[0].shape[1], sum(weight.shape[0] for weight in weights)
    if any(weight.shape[1] != inputs for weight in weights):
        raise ValueError(f"weights of {[weight.shape[1] for weight in weights]} inputs cannot be stacked")
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"a bias of shape {bias.shape} does not fit {outputs} outputs")
    parts, begin = [], 0
    for form, stack in groupby((_regrouped(weight, rounds_inputs) for weight in weights), _form):
        same = list(stack)
        end = begin + sum(weight.shape[0] for weight in same)
        offsets = None if bias is None else torch.tensor(bias[begin:end], dtype=torch.float32, device=device)
        parts.append(_stacked(form, same, offsets, device))
        begin = end
    return parts


def _regrouped(weight: Weight, rounds_inputs: bool) -> Weight:
    """The same weight as the kernels know such: one scale an output, or groups that `DeviceWeight.group` allows; a minimum for a zero; and
    without a wish about inputs that is not to be granted."""
    if isinstance(weight, Dense):
        return weight
    inputs = weight.inputs if rounds_inputs and _can_be_rounded(weight.inputs) else None
    if isinstance(weight, ScaledFloat):
        outputs, group = weight.block
        if group % STEP and group < weight.shape[1]:
            return Dense(weight.dequantize())
        spread = SPREAD if outputs % SPREAD == 0 and weight.shape[0] % SPREAD == 0 and weight.scales.shape[1] > 1 else 1
        scales = np.repeat(weight.scales, outputs // spread, 0)[: weight.shape[0] // spread]
        return ScaledFloat(weight.codes, scales, (spread, group if scales.shape[1] > 1 else 0), inputs)
    scales, minimums, group = weight.scales, weight.minimums, weight.group
    if weight.zeros is not None:
        minimums = -scales * weight.zeros
    if group == weight.shape[1]:
        group = 0
    elif group % STEP:
        if (group := math.gcd(weight.group, STEP)) < LEAST_PART:
            return Dense(weight.dequantize())
        scales, minimums = (None if x is None else np.repeat(x, weight.group // group, 1) for x in (scales, minimums))
    return GroupedInt(weight.codes, scales, minimums, group, weight.bits, None, inputs if minimums is None and group == 0 else None)


def _can_be_rounded(inputs: InputRounding | None) -> bool:
    """Whether `scaled.py` can: groups end with its steps."""
    return inputs is not None and (inputs.group is None or inputs.group % STEP == 0)


def _form(weight: Weight) -> tuple:
    """What weights that are stacked have in common."""
    if isinstance(weight, Dense):
        return "floats", weight.dtype
    if isinstance(weight, ScaledFloat):
        return "e4m3", weight.block, weight.inputs
    nibbles = weight.bits == 4 and weight.shape[1] % (2 * part_of("nibbles", weight.group)) == 0 and weight.inputs is None
    low = -8 if nibbles and weight.minimums is None else 0
    return "nibbles" if nibbles else "bytes", weight.group, weight.minimums is None, weight.inputs, low


def _stacked(form: tuple, weights: list[Weight], bias: torch.Tensor | None, device: torch.device) -> DeviceWeight:
    inputs = weights[0].shape[1]
    if form[0] == "floats":
        rows = [_floats(weight, device) for weight in weights if isinstance(weight, Dense)]
        return DeviceWeight("floats", torch.cat(rows) if len(rows) > 1 else rows[0], inputs, bias)
    if form[0] == "e4m3":
        scaled = [weight for weight in weights if isinstance(weight, ScaledFloat)]
        codes = torch.from_numpy(np.concatenate([weight.codes for weight in scaled])).to(device)
        values = codes.view(torch.float8_e4m3fn) if knows_float8(device) else codes
        scales = _by_group([weight.scales for weight in scaled], device).float()
        spread, group = form[1]
        return DeviceWeight("e4m3", values, inputs, bias, scales, None, group, spread, 0, form[2])
    integers = [weight for weight in weights if isinstance(weight, GroupedInt)]
    _, group, _, rounding, low = form
    codes = np.concatenate([weight.codes for weight in integers])
    if form[0] == "nibbles":
        halves = (codes - low).astype(np.uint8).reshape(len(codes), -1, 2, part_of("nibbles", group))
        codes = (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(len(codes), -1)
    minimums = [weight.minimums for weight in integers if weight.minimums is not None]
    return DeviceWeight(
        form[0],
        torch.from_numpy(codes).to(device),
        inputs,
        bias,
        _by_group([weight.scales for weight in integers], device),
        _by_group(minimums, device) if minimums else None,
        group,
        1,
        low,
        rounding,
    )


def _floats(weight: Dense, device: torch.device) -> torch.Tensor:
    values = torch.from_numpy(
        np.require(weight.values.view(np.int16) if weight.values.dtype == np.uint16 else weight.values, requirements="CW")
    )
    return values.to(device).view(FLOATS[weight.dtype])


def _by_group(parts: Sequence[np.ndarray], device: torch.device) -> torch.Tensor:
    """float32 [N, groups] each as one [groups, N] on the device: in float16 if that holds every value."""
    values = np.ascontiguousarray(np.concatenate(parts).T, np.float32)
    with np.errstate(over="ignore"):
        halves = values.astype(np.float16)
    return torch.from_numpy(halves if np.array_equal(halves.astype(np.float32), values) else values).to(device)
