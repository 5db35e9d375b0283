"""Operations that combine the elements along an axis by a region of the kernel's own."""

import re

from headrace.kernels.triton_cpu.program import Program, lowers
from headrace.kernels.triton_cpu.tile_ir import Operation, Type, Value

LANES = 16


@lowers("tt.reduce")
def _reduced(to: Program, op: Operation, number: int) -> int:
    axis = op.attribute("axis")
    head = op.text[: op.text.index(")")]
    inputs = [to.hold(to.value(name)) for name in re.findall(r"%[\w$.-]+(?:#\d+)?", head)]
    block = to.body[number + 1]
    names = re.findall(r"(%[\w$.-]+): ", block)
    end = number + 2
    while not to.body[end].startswith("})"):
        end += 1
    shape, size = inputs[0].type.shape, inputs[0].type.shape[axis]
    result = tuple(one for place, one in enumerate(shape) if place != axis)
    types = [Type(result, one.type.element) for one in inputs]
    index = [f"i{place}" for place in range(len(result))]
    held = [to.held(type, to.array(type)) if result else to.scalar(type, f"{type.c}{{}}") for type in types]
    # One reduction in LANES interleaved parts, which become one at the end; several at once in order.
    lanes = LANES if len(inputs) == 1 and size % LANES == 0 and size > LANES else 1

    def combine(left: list[str], right: list[str], types: list[Type]) -> None:
        """left = combine(left, right), by the operations of the region."""
        values = {
            name: Value(Type((), type.element), lambda i, text=text: text)
            for name, text, type in zip(names, (*left, *right), (*types, *types), strict=True)
        }

        def give(yielded: list[str]) -> None:
            parts = [(to.fresh("y"), to.value(name)) for name in yielded]
            for name, value in parts:
                to.emit(f"const {value.type.c} {name} = {value.at([])};")
            for target, (name, _) in zip(left, parts, strict=True):
                to.emit(f"{target} = {name};")

        to.nested(number + 2, values, give)

    def full(place: str) -> list[str]:
        return [*index[:axis], place, *index[axis:]]

    for i, one in zip(index, result, strict=True):
        to.emit(f"for (int {i} = 0; {i} < {one}; {i}++)")
    to.emit("{")
    accumulators = [to.fresh("r") for _ in inputs]
    for name, one in zip(accumulators, inputs, strict=True):
        to.emit(f"{one.type.c} {name}[{lanes}];")
        to.emit(f"for (int l = 0; l < {lanes}; l++) {name}[l] = {one.at(full('l'))};")
    to.emit(f"for (int j = {lanes}; j < {size}; j += {lanes}) for (int l = 0; l < {lanes}; l++) {{")
    combine([f"{name}[l]" for name in accumulators], [one.at(full("(j + l)")) for one in inputs], [one.type for one in inputs])
    to.emit("}")
    if lanes > 1:
        to.emit(f"for (int l = 1; l < {lanes}; l++) {{")
        combine([f"{name}[0]" for name in accumulators], [f"{name}[l]" for name in accumulators], [one.type for one in inputs])
        to.emit("}")
    for name, one in zip(accumulators, held, strict=True):
        to.emit(f"{one.at(index)} = {name}[0];")
    to.emit("}")
    for name, one in zip(op.results, held, strict=True):
        to.scopes[-1][name] = one
    return end + 1
