"""Operations that combine the elements along an axis by a region of the kernel's own: reductions and scans.

A tile is seen as outer × axis × inner; its region becomes C++ of scalars, as often as it stands in a loop.
"""

import math
import re

from headrace.kernels.triton_cpu.program import Program, lowers
from headrace.kernels.triton_cpu.tile_ir import Operation, Type, Value

LANES = 16


class _Fold:
    """What a reduction and a scan have in common: inputs that are held, an axis, a region that combines two elements."""

    def __init__(self, to: Program, op: Operation, number: int) -> None:
        self.to, self.number = to, number
        self.axis = op.attribute("axis")
        head = op.text[: op.text.index(")")]
        self.inputs = [to.hold(to.value(name)) for name in re.findall(r"%[\w$.-]+(?:#\d+)?", head)]
        self.types = [Type((), one.type.element) for one in self.inputs]
        shape = self.inputs[0].type.shape
        self.outer, self.size, self.inner = math.prod(shape[: self.axis]), shape[self.axis], math.prod(shape[self.axis + 1 :])
        self.names = re.findall(r"(%[\w$.-]+): ", to.body[number + 1])
        self.end = number

    def elements(self, place: str) -> list[str]:
        """Of each input, the element at a place on the axis."""
        return [f"{one.array}[(o * {self.size} + {place}) * {self.inner} + i]" for one in self.inputs]

    def open(self) -> None:
        self.to.emit(f"for (int o = 0; o < {self.outer}; o++) for (int i = 0; i < {self.inner}; i++) {{")

    def combine(self, left: list[str], right: list[str]) -> None:
        """left = combine(left, right)."""
        values = {
            name: Value(type, lambda index, text=text: text)
            for name, text, type in zip(self.names, (*left, *right), (*self.types, *self.types), strict=True)
        }

        def give(yielded: list[str]) -> None:
            parts = [(self.to.fresh("y"), self.to.value(name)) for name in yielded]
            for name, value in parts:
                self.to.emit(f"const {value.type.c} {name} = {value.at([])};")
            for target, (name, _) in zip(left, parts, strict=True):
                self.to.emit(f"{target} = {name};")

        self.end = self.to.nested(self.number + 2, values, give)


@lowers("tt.reduce")
def _reduced(to: Program, op: Operation, number: int) -> int:
    fold = _Fold(to, op, number)
    inputs, size = fold.inputs, fold.size
    result = tuple(one for place, one in enumerate(inputs[0].type.shape) if place != fold.axis)
    types = [Type(result, one.type.element) for one in inputs]
    held = [to.held(type, to.array(type)) if result else to.scalar(type, f"{type.c}{{}}") for type in types]
    # One reduction in LANES interleaved parts, which become one at the end; several at once in order.
    lanes = LANES if len(inputs) == 1 and size % LANES == 0 and size > LANES else 1
    fold.open()
    sums = [to.fresh("r") for _ in inputs]
    for name, type, first in zip(sums, types, fold.elements("l"), strict=True):
        to.emit(f"{type.c} {name}[{lanes}];")
        to.emit(f"for (int l = 0; l < {lanes}; l++) {name}[l] = {first};")
    to.emit(f"for (int j = {lanes}; j < {size}; j += {lanes}) for (int l = 0; l < {lanes}; l++) {{")
    fold.combine([f"{name}[l]" for name in sums], fold.elements("(j + l)"))
    to.emit("}")
    if lanes > 1:
        to.emit(f"for (int l = 1; l < {lanes}; l++) {{")
        fold.combine([f"{name}[0]" for name in sums], [f"{name}[l]" for name in sums])
        to.emit("}")
    for name, one in zip(sums, held, strict=True):
        to.emit(f"{f'{one.array}[o * {fold.inner} + i]' if result else one.at([])} = {name}[0];")
    to.emit("}")
    for name, one in zip(op.results, held, strict=True):
        to.scopes[-1][name] = one
    return fold.end + 1


@lowers("tt.scan")
def _scanned(to: Program, op: Operation, number: int) -> int:
    fold = _Fold(to, op, number)
    held = [to.held(one.type, to.array(one.type)) for one in fold.inputs]
    place = f"({fold.size - 1} - j)" if "reverse = true" in op.text else "j"
    fold.open()
    sums = [to.fresh("r") for _ in held]
    for name, type, first in zip(sums, fold.types, fold.elements(place.replace("j", "0")), strict=True):
        to.emit(f"{type.c} {name} = {first};")
    to.emit(f"for (int j = 0; j < {fold.size}; j++) {{")
    to.emit("if (j > 0) {")
    fold.combine(sums, fold.elements(place))
    to.emit("}")
    for name, one in zip(sums, held, strict=True):
        to.emit(f"{one.array}[(o * {fold.size} + {place}) * {fold.inner} + i] = {name};")
    to.emit("}")
    to.emit("}")
    for name, one in zip(op.results, held, strict=True):
        to.scopes[-1][name] = one
    return fold.end + 1
