"""Weights as the native kernels want them: packed once into panels of 16 outputs, codes beside their scales (`src/ops.h` has the layout).

    Dense f32 | bf16 | f16   ─▶  as stored
    GroupedInt               ─▶  codes of 4 bits two to a byte, others one; scales and minimums as binary16, as the two levels of
                                 K-quants, or as float32: the first of these that is exact. Zeros as bytes beside scales of binary16
    ScaledFloat              ─▶  codes a byte each; a scale for each output and group of inputs as binary16, or else as float32

Every weight is multiplied as what it dequantizes to, or, with int8 inputs, as its codes less their zeros, exactly. Inputs are rounded finer
than formats ask, in groups of 32 to 8 bits or not at all, since float8 inputs would only cost time here.

Weights that are stacked into one layer need not be alike: each run of those that are becomes one `Part`. The same packed weight serves
`linear` and `embed`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from headrace.kernels.cpu import _native
from headrace.kernels.weights import Dense, GroupedInt, ScaledFloat, Weight

FORMAT = 2
"""Rises with every change of what `pack` makes of the same weights, src/pack.cpp included."""

Allocate = Callable[[int], np.ndarray]
"""So many bytes, as uint8 from a 64-byte boundary on."""

_FORMS = {"float32": 0, "bfloat16": 1, "float16": 2}
_BF16, _INT8, _INT6, _INT4, _E4M3 = 1, 3, 4, 5, 6
_NAMES = ("f32", "bf16", "f16", "int8", "int6", "int4", "e4m3")
_F32_SCALES, _F16_SCALES = 0, 1
_QUANTUM = 32
_LOW_BITS = 0x1FF
"""Of a float32: all 0, it has 15 significant bits at most."""
_ACTIVATIONS = {"f32": 0, "int8": 1, "bf16": 2}
"""What x can be made before it is multiplied, and the number of each in src/ops.h."""


class Part(NamedTuple):
    """How some outputs of a layer are stored; the fields of `Linear` in src/ops.h."""

    form: int
    scales: int
    minimums: bool
    offset: int
    outputs: int
    inputs: int
    group: int
    experts: int = 1
    """How many weights like this lie one behind the other."""

    def native(self, panels: int, bias: int, activations: str, following: "_native.Linear | None") -> "_native.Linear":
        return _native.Linear(
            self.form,
            self.scales,
            self.minimums,
            _ACTIVATIONS[activations],
            self.offset,
            self.outputs,
            self.inputs,
            self.group,
            panels,
            bias,
            following,
        )

    @property
    def nbytes(self) -> int:
        return self.experts * self.native(0, 0, "f32", None).size

    @property
    def codes(self) -> "Codes":
        """What it is multiplied with where that is int8."""
        return Codes(min(self.group, _QUANTUM), self.minimums)

    @property
    def fits_bf16(self) -> bool:
        """Whether its numbers are exact in bfloat16, scales apart, and not in int8."""
        return self.form in (_BF16, _E4M3)

    @property
    def name(self) -> str:
        """The type of its numbers, in short."""
        return _NAMES[self.form]

    def takes(self, activations: str) -> bool:
        """Whether there are kernels that multiply these activations with it."""
        if activations == "f32":
            return True
        if self.inputs % _QUANTUM or self.group % 16 or (self.group % _QUANTUM and self.group != 16):
            return False
        if activations == "bf16":
            return self.form == _BF16 or self.form >= _INT8
        if self.group == 16:
            return self.form == _INT6 and not self.minimums
        return self.form in (_INT8, _INT6, _INT4)


class Codes(NamedTuple):
    """How rows of int8 differ, the same inputs given; see what follows `Linear` in src/ops.h."""

    unit: int
    """Inputs that share a sum."""
    scaled: bool
    """Whether sums are multiplied with their scale."""


class Packed:
    """A layer's weight [N, K], or those of several experts, bound to where the panels lie."""

    def __init__(self, parts: Sequence[tuple[Part, np.ndarray]], bias: np.ndarray | None, activations: Sequence[str]) -> None:
        """`bias` is float32 [N]; `activations` are what each part is multiplied with, which it must take."""
        self.inputs = parts[0][0].inputs
        self.outputs = sum(part.outputs for part, _ in parts)
        self.experts = parts[0][0].experts
        if bias is not None:
            if bias.shape != (self.outputs,):
                raise ValueError(f"a bias of shape {tuple(bias.shape)} does not fit {self.outputs} outputs")
            bias = np.ascontiguousarray(bias, np.float32)
        # Native code knows addresses alone: what lies there must not go before this does.
        self._panels, self._bias = [panels for _, panels in parts], bias
        self.activations = next((one for one in activations if one != "f32"), "f32")
        """What it is multiplied with, in the main."""
        codes = {part.codes if wanted == "int8" else None for (part, _), wanted in zip(parts, activations, strict=True)}
        self.codes: Codes | None = codes.pop() if len(codes) == 1 else None
        """The rows of int8 that all parts are multiplied with, if they are."""
        self.one_part = len(parts) == 1
        """Whether one kernel can take a half of its outputs with the other."""
        self.name = f"{'+'.join(dict.fromkeys(part.name for part, _ in parts))} × {self.activations}"
        self._natives: list[_native.Linear] = []
        following, end = None, self.outputs
        for (part, panels), wanted in zip(reversed(parts), reversed(activations), strict=True):
            end -= part.outputs
            at = 0 if bias is None else bias[end:].ctypes.data
            following = part.native(panels.ctypes.data, at, wanted, following)
            self._natives.append(following)

    @property
    def native(self) -> "_native.Linear":
        """The first part, which leads to the others."""
        return self._natives[-1]

    @property
    def nbytes(self) -> int:
        return sum(panels.nbytes for panels in self._panels)


def pack(engine: "_native.Engine", weights: Sequence[Weight], allocate: Allocate) -> list[tuple[Part, np.ndarray]]:
    """Several weights of equal K, stacked along N. ValueError where shapes do not fit."""
    if not weights:
        raise ValueError("a linear layer needs at least one weight")
    runs: list[tuple[Part, list[Weight]]] = []
    for weight in map(_checked, weights):
        if weight.shape[1] != weights[0].shape[1]:
            raise ValueError(f"weights of {weight.shape[1]} and {weights[0].shape[1]} inputs cannot be stacked")
        part = _part(engine, [weight])
        if runs and runs[-1][0]._replace(outputs=part.outputs) == part:
            run, alike = runs.pop()
            runs.append((part._replace(outputs=run.outputs + part.outputs), [*alike, weight]))
        else:
            runs.append((part, [weight]))
    return [(part, _packed(engine, part, alike, allocate)) for part, alike in runs]


def pack_experts(
    engine: "_native.Engine", experts: int, stacks: Sequence[Sequence[Weight]], allocate: Allocate
) -> list[tuple[Part, np.ndarray]]:
    """The same for the stacks of so many experts: a part for each place in the stack. ValueError also where experts differ."""
    if len(stacks) != experts:
        raise ValueError(f"there are weights of {len(stacks)} experts: it must be {experts}")
    columns = [[_checked(weight) for weight in column] for column in zip(*stacks, strict=True)]
    if not columns:
        raise ValueError("a linear layer needs at least one weight")
    parts = []
    for weights in columns:
        if len(forms := {_form_of(weight) for weight in weights}) != 1:
            raise ValueError(f"experts must have weights of one form, not of {sorted(map(str, forms))}")
        if weights[0].shape[1] != columns[0][0].shape[1]:
            raise ValueError(f"weights of {weights[0].shape[1]} and {columns[0][0].shape[1]} inputs cannot be stacked")
        part = _part(engine, weights)
        size, panels = part.nbytes, allocate(part._replace(experts=experts).nbytes)
        for expert, weight in enumerate(weights):
            engine.pack([_rows(weight)], part.native(0, 0, "f32", None), panels.ctypes.data + expert * size)
        parts.append((part._replace(experts=experts), panels))
    return parts


def _form_of(weight: Weight) -> tuple:
    if isinstance(weight, Dense):
        return weight.dtype, weight.shape
    if isinstance(weight, ScaledFloat):
        return "e4m3", weight.shape, weight.block
    return "integers", weight.shape, weight.group, weight.minimums is not None, weight.zeros is not None


def _part(engine: "_native.Engine", weights: Sequence[Weight]) -> Part:
    """How each of these, which are alike, is stored."""
    first = weights[0]
    outputs, inputs = first.shape
    if isinstance(first, Dense):
        return Part(_FORMS[first.dtype], 0, False, 0, outputs, inputs, inputs)
    if isinstance(first, ScaledFloat):
        halves = all(isinstance(weight, ScaledFloat) and _are_halves(weight.scales) for weight in weights)
        return Part(_E4M3, _F16_SCALES if halves else _F32_SCALES, False, 0, outputs, inputs, first.block[1])
    form, scales, offset = engine.choose([_rows(weight) for weight in weights], inputs, first.group)
    return Part(form, scales, first.minimums is not None or first.zeros is not None, offset, outputs, inputs, first.group)


def _packed(engine: "_native.Engine", part: Part, weights: Sequence[Weight], allocate: Allocate) -> np.ndarray:
    panels = allocate(part.nbytes)
    engine.pack([_rows(weight) for weight in weights], part.native(0, 0, "f32", None), panels.ctypes.data)
    return panels


def _rows(weight: Weight) -> "_native.Rows":
    """Outputs, and the addresses of values, scales, minimums and zeros."""
    if isinstance(weight, Dense):
        return weight.shape[0], weight.values.ctypes.data, 0, 0, 0
    beside = (None, None) if isinstance(weight, ScaledFloat) else (weight.minimums, weight.zeros)
    minimums, zeros = (0 if values is None else values.ctypes.data for values in beside)
    return weight.shape[0], weight.codes.ctypes.data, weight.scales.ctypes.data, minimums, zeros


def _checked(weight: Weight) -> Weight:
    """The weight in contiguous memory, in a form that the native kernels have. ValueError unless it is whole."""
    storage = weight.values if isinstance(weight, Dense) else weight.codes
    if storage.ndim != 2 or storage.size == 0:
        raise ValueError(f"a weight must be a matrix and hold something, it is {list(storage.shape)}")
    if isinstance(weight, Dense):
        _ = weight.dtype
        return Dense(np.ascontiguousarray(weight.values))
    if isinstance(weight, ScaledFloat):
        return _checked_floats(weight)
    outputs, inputs = weight.shape
    groups = (outputs, inputs // max(weight.group, 1))
    if weight.group < 1 or inputs % weight.group:
        raise ValueError(f"{inputs} inputs cannot be cut into groups of {weight.group}")
    if weight.codes.dtype != np.int8:
        raise ValueError(f"codes must be int8, they are {weight.codes.dtype}")
    for name, values, dtype in (("scales", weight.scales, "f4"), ("minimums", weight.minimums, "f4"), ("zeros", weight.zeros, "i1")):
        if values is not None and (values.dtype != dtype or values.shape != groups):
            raise ValueError(f"{name} must be {np.dtype(dtype)} {groups}, they are {values.dtype} {tuple(values.shape)}")
    if weight.minimums is not None and weight.zeros is not None:
        raise ValueError("a weight may have minimums or zeros, it has both")
    if weight.group % 4:
        return Dense(weight.dequantize())  # Blocks hold 4 inputs of an output side by side; no format has such groups.
    known = _without_strange_zeros(weight)
    if isinstance(known, Dense):
        return known
    minimums, zeros = (None if values is None else np.ascontiguousarray(values) for values in (known.minimums, known.zeros))
    codes, scales = np.ascontiguousarray(known.codes), np.ascontiguousarray(known.scales)
    return GroupedInt(codes, scales, minimums, known.group, known.bits, zeros)


def _without_strange_zeros(weight: GroupedInt) -> GroupedInt | Dense:
    """The same values with zeros only beside scales of binary16: else as minimums, or taken off the codes, or as floats."""
    zeros, scales = weight.zeros, weight.scales
    if zeros is None or _are_halves(scales):
        return weight
    if not np.any(np.ascontiguousarray(scales).view(np.int32) & _LOW_BITS):
        return replace(weight, zeros=None, minimums=-(scales * zeros))
    if weight.bits == 4:
        each = np.repeat(zeros, weight.group, axis=1)
        return replace(weight, zeros=None, bits=5, codes=(weight.codes - each).astype(np.int8))
    return Dense(weight.dequantize())


def _checked_floats(weight: ScaledFloat) -> ScaledFloat | Dense:
    """The same with scales for each output, in whole groups of inputs."""
    (outputs, inputs), block = weight.shape, weight.block
    if min(block) < 1:
        raise ValueError(f"blocks of {block} hold nothing")
    if weight.codes.dtype != np.uint8:
        raise ValueError(f"codes must be uint8, they are {weight.codes.dtype}")
    blocks = (-(-outputs // block[0]), -(-inputs // block[1]))
    if weight.scales.dtype != np.float32 or weight.scales.shape != blocks:
        raise ValueError(f"scales must be float32 {blocks}, they are {weight.scales.dtype} {tuple(weight.scales.shape)}")
    block = (min(block[0], outputs), min(block[1], inputs))
    group = math.gcd(block[1], inputs)
    if group % 4 or np.any((weight.codes & 127) == 127):
        return Dense(weight.dequantize())  # No format has such groups, and no checkpoint that works holds NaN.
    scales = np.repeat(weight.scales, block[0], axis=0)[:outputs]
    scales = np.repeat(scales, -(-block[1] // group), axis=1)[:, : inputs // group]
    return ScaledFloat(np.ascontiguousarray(weight.codes), np.ascontiguousarray(scales), (1, group))


def _are_halves(values: np.ndarray) -> bool:
    """Whether binary16 holds all of these float32, infinities aside."""
    with np.errstate(over="ignore"):
        return bool(np.array_equal(values.astype(np.float16).astype(np.float32), values) and np.all(np.isfinite(values)))
