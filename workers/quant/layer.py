"""The tensors that a quantized Hugging Face checkpoint stores for one linear layer, and what a rank takes of them.

    layer.read("scales", "F16", shape=(groups, outputs)) ──▶ a view of the file, after its type and shape were checked
    cut(layer, (N, K), group, rows, columns) ──▶ Cut: where the rank's part begins and ends

Used by the formats beside it. Every fault is a UserError that names the tensor.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from headrace.engine.checkpoint.hf import StoredTensor
from headrace.engine.checkpoint.quantization import Scheme
from headrace.engine.errors import UserError
from headrace.kernels.weights import InputRounding, widened

FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class Layer:
    name: str
    """Without ".weight" and what stands for it."""
    path: Path
    """Of the model."""
    tensors: Mapping[str, StoredTensor]
    view: Callable[[StoredTensor], np.ndarray]
    """The values of a tensor, sharing the file's memory; bfloat16 as uint16, float8 as uint8."""

    def __contains__(self, part: str) -> bool:
        return f"{self.name}.{part}" in self.tensors

    def called(self, *names: str) -> str:
        """Which of these names a part has here; the first if none."""
        return next((name for name in names if name in self), names[0])

    def stored(self, part: str) -> StoredTensor:
        if (stored := self.tensors.get(f"{self.name}.{part}")) is None:
            raise UserError(f"{self.path} has no tensor {self.name + '.' + part!r}, which its format stores: get the checkpoint anew")
        return stored

    def matrix(self, part: str) -> tuple[int, int]:
        """The shape of a tensor that must be a matrix that holds something."""
        shape = self.stored(part).shape
        if len(shape) != 2 or min(shape) < 1:
            raise self.fault(part, f"has the shape {list(shape)} where a matrix is expected")
        return shape[0], shape[1]

    def read(self, part: str, *types: str, shape: tuple[int, ...]) -> np.ndarray:
        """A tensor of one of these types in this shape; dimensions of 1 may be stored or not."""
        stored = self.stored(part)
        if stored.dtype not in types:
            raise self.fault(part, f"has the type {stored.dtype} where {' or '.join(types)} is expected")
        if [size for size in stored.shape if size != 1] != [size for size in shape if size != 1]:
            raise self.fault(part, f"has the shape {list(stored.shape)} where {list(shape)} is expected")
        return self.view(stored).reshape(shape)

    def floats(self, part: str, shape: tuple[int, ...]) -> np.ndarray:
        """The same for floats, in float32."""
        return widened(self.read(part, *FLOATS, shape=shape))

    def inputs(self, scheme: Scheme) -> InputRounding | None:
        """How the layer wants its inputs rounded."""
        kind = "e4m3" if scheme.kind == "float" else "int8"
        if scheme.inputs is None or not scheme.inputs.static:
            return None if scheme.inputs is None else InputRounding(kind, scheme.inputs.group)
        name = self.called("input_scale", "activation_scale")
        scale = float(self.floats(name, (1,))[0])
        if not 0 < scale < np.inf:
            raise self.fault(name, f"holds {scale}: a scale is a number above 0")
        return InputRounding(kind, scale=scale)

    def fault(self, part: str, what: str) -> UserError:
        return UserError(f"{self.stored(part).file}: tensor {self.name + '.' + part!r} {what}: get the checkpoint anew")


@dataclass(frozen=True, slots=True)
class Cut:
    """A rank's part of a weight [N, K] in groups along K."""

    rows: slice
    columns: slice
    groups: slice
    group: int
    """Inputs a group, of the part."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start


def cut(layer: Layer, shape: tuple[int, int], group: int | None, rows: slice | None, columns: slice | None, ragged: bool = False) -> Cut:
    """What `rows` and `columns` take of a weight whose groups are of so many inputs, or of all. UserError where they cut through one, and
    where the last is short, unless `ragged` allows that."""
    outputs, inputs = shape
    if group is not None and inputs % group and not ragged:
        raise UserError(f"{layer.path}: layer {layer.name!r} has {inputs} inputs, which are no whole groups of {group}: get it anew")
    row, column = _bounds(layer, "rows", rows, outputs), _bounds(layer, "columns", columns, inputs)
    if group is None or group >= inputs:
        return Cut(row, column, slice(0, 1), column.stop - column.start)
    if column.start % group or (column.stop % group and column.stop < inputs):
        raise UserError(
            f"{layer.path}: layer {layer.name!r} cannot be cut there: "
            f"columns {column.start}:{column.stop} must fall on multiples of {group}"
        )
    return Cut(row, column, slice(column.start // group, -(-column.stop // group)), group)


def _bounds(layer: Layer, name: str, part: slice | None, size: int) -> slice:
    start, stop, _ = (part or slice(None)).indices(size)
    if stop <= start:
        raise UserError(f"{layer.path}: layer {layer.name!r} cannot be cut there: {name} {start}:{stop} of {size} are none")
    return slice(start, stop)
