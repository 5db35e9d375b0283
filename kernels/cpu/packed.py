"""Weights as the native kernels want them: packed once into panels of 16 outputs, interleaved by input (`src/ops.h` has the layout).

    Dense f32 | bf16 | f16   ─▶  as stored
    GroupedInt of 4 bits     ─▶  two codes to a byte
    GroupedInt of 5, 6, 8    ─▶  a byte a code
    scales, minimums         ─▶  binary16 where that is exact, else float32

The same packed weight serves `linear` and `embed`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from headrace.kernels.cpu import _native
from headrace.kernels.weights import Dense, GroupedInt, Weight

PANEL: int = _native.PANEL

_FLOATS = {"float32": 0, "bfloat16": 1, "float16": 2}
_INT8, _INT4 = 3, 4


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight [N, K] in panels, and the tensors that `native` points into."""

    native: _native.Linear
    outputs: int
    inputs: int
    storage: tuple[np.ndarray | None, ...]
    """Values, scales, minimums, bias."""

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.storage if tensor is not None)


def pack(engine: _native.Engine, weights: Sequence[Weight], bias: np.ndarray | None = None) -> Packed:
    """Several weights of equal K, stacked along N. ValueError where shapes do not fit."""
    if not weights:
        raise ValueError("a linear layer needs at least one weight")
    inputs = weights[0].shape[1]
    outputs = sum(weight.shape[0] for weight in weights)
    for weight in weights:
        storage = weight.codes if isinstance(weight, GroupedInt) else weight.values
        if storage.ndim != 2 or storage.size == 0:
            raise ValueError(f"a weight must be a matrix and hold something, it is {list(storage.shape)}")
        if weight.shape[1] != inputs:
            raise ValueError(f"weights of {weight.shape[1]} and {inputs} inputs cannot be stacked")
    if bias is not None:
        if bias.shape != (outputs,):
            raise ValueError(f"a bias of shape {tuple(bias.shape)} does not fit {outputs} outputs")
        bias = np.ascontiguousarray(bias, np.float32)
    integers = [_checked(weight) for weight in weights if isinstance(weight, GroupedInt)]
    if len(integers) == len(weights) and len({(one.group, one.minimums is None) for one in integers}) == 1:
        return _pack_integers(engine, integers, outputs, inputs, bias)
    dense = [weight if isinstance(weight, Dense) else Dense(weight.dequantize()) for weight in weights]
    kinds = {weight.dtype for weight in dense}
    kind = kinds.pop() if len(kinds) == 1 else "float32"
    values = _panels_of(engine, [weight.values if weight.dtype == kind else weight.dequantize() for weight in dense])
    native = _native.Linear(_FLOATS[kind], outputs, inputs, inputs, 0, False, values.ctypes.data, 0, 0, _address(bias))
    return Packed(native, outputs, inputs, (values, None, None, bias))


def _pack_integers(engine: _native.Engine, weights: list[GroupedInt], outputs: int, inputs: int, bias: np.ndarray | None) -> Packed:
    group, offset = weights[0].group, 0
    scales = [weight.scales for weight in weights]
    minimums = None if weights[0].minimums is None else [weight.minimums for weight in weights if weight.minimums is not None]
    halves = all(_fits_half(values) for values in (*scales, *(minimums or ())))
    kept = np.float16 if halves else np.float32
    packed_scales = _panels_of(engine, [values.astype(kept) for values in scales])
    packed_minimums = None if minimums is None else _panels_of(engine, [values.astype(kept) for values in minimums])
    lowest, highest = min(int(weight.codes.min()) for weight in weights), max(int(weight.codes.max()) for weight in weights)
    # An offset stands in for the minimum, so signed codes that also have minimums are not packed two to a byte.
    offset = 8 if lowest < 0 else 0
    if lowest + offset >= 0 and highest + offset <= 15 and group % 2 == 0 and not (offset and minimums):
        form, codes = _INT4, _stacked([weight.codes for weight in weights])
        values = np.empty((_panels(outputs), inputs // 2, PANEL), np.uint8)
        engine.pack_nibbles(codes.ctypes.data, outputs, inputs, offset, values.ctypes.data)
    else:
        form, offset, values = _INT8, 0, _panels_of(engine, [weight.codes for weight in weights])
    storage = values, packed_scales, packed_minimums, bias
    addresses = values.ctypes.data, _address(packed_scales), _address(packed_minimums), _address(bias)
    return Packed(_native.Linear(form, outputs, inputs, group, offset, halves, *addresses), outputs, inputs, storage)


def _checked(weight: GroupedInt) -> GroupedInt:
    outputs, inputs = weight.shape
    groups = (outputs, inputs // max(weight.group, 1))
    if weight.group < 1 or inputs % weight.group:
        raise ValueError(f"{inputs} inputs cannot be cut into groups of {weight.group}")
    if weight.codes.dtype != np.int8:
        raise ValueError(f"codes must be int8, they are {weight.codes.dtype}")
    for name, values in (("scales", weight.scales), ("minimums", weight.minimums)):
        if values is not None and (values.dtype != np.float32 or values.shape != groups):
            raise ValueError(f"{name} must be float32 {groups}, they are {values.dtype} {tuple(values.shape)}")
    return weight


def _panels_of(engine: _native.Engine, parts: list[np.ndarray]) -> np.ndarray:
    """Tensors [N, X] of one type, stacked: [panels, X, PANEL]."""
    values = _stacked(parts)
    packed = np.empty((_panels(values.shape[0]), values.shape[1], PANEL), values.dtype)
    engine.pack(values.ctypes.data, values.shape[0], values.shape[1], values.itemsize, packed.ctypes.data)
    return packed


def _stacked(parts: list[np.ndarray]) -> np.ndarray:
    return np.ascontiguousarray(parts[0]) if len(parts) == 1 else np.concatenate(parts)


def _panels(outputs: int) -> int:
    return -(-outputs // PANEL)


def _address(tensor: np.ndarray | None) -> int:
    return 0 if tensor is None else tensor.ctypes.data


def _fits_half(values: np.ndarray) -> bool:
    with np.errstate(over="ignore"):
        return np.array_equal(values.astype(np.float16).astype(np.float32), values)
