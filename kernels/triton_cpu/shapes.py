"""Operations that place elements: ranges, shapes, what stands side by side. Most are views, which cost nothing."""

import re

from headrace.kernels.triton_cpu.program import Program, lowers
from headrace.kernels.triton_cpu.tile_ir import Operation, Type, Unsupported, Value


@lowers("tt.get_program_id", "tt.get_num_programs")
def _program(to: Program, op: Operation, number: int) -> None:
    axis = "xyz".index(op.text.split()[0])
    name = f"{'p' if op.name == 'tt.get_program_id' else 'g'}{axis}"
    to.scopes[-1][op.results[0]] = Value(Type((), "i32"), lambda index: name)


@lowers("tt.make_range")
def _range(to: Program, op: Operation, number: int) -> None:
    start = op.attribute("start")
    to.scopes[-1][op.results[0]] = Value(op.type, lambda index: f"({start} + {index[0]})" if start else index[0])


@lowers("tt.splat")
def _splat(to: Program, op: Operation, number: int) -> None:
    (x,) = op.operands(to.value)
    to.scopes[-1][op.results[0]] = Value(op.result, lambda index: x.at([]), True, None, x.base)


@lowers("tt.expand_dims")
def _expand(to: Program, op: Operation, number: int) -> None:
    (x,) = op.operands(to.value)
    axis = op.attribute("axis")
    to.define(op.results[0], Value(op.result, lambda index: x.at([*index[:axis], *index[axis + 1 :]]), x.cheap, None, x.base))


@lowers("tt.broadcast")
def _broadcast(to: Program, op: Operation, number: int) -> None:
    (x,) = op.operands(to.value)
    x = x if x.cheap else to.hold(x)
    at = lambda index: x.at(["0" if size == 1 else i for size, i in zip(x.type.shape, index, strict=True)])  # noqa: E731
    to.scopes[-1][op.results[0]] = Value(op.result, at, True, None, x.base)


@lowers("tt.trans")
def _transposed(to: Program, op: Operation, number: int) -> None:
    (x,) = op.operands(to.value)
    x = to.hold(x)
    match = re.search(r"array<i32: ([\d, ]+)>", op.text)
    assert match, op.text
    order = [int(axis) for axis in match[1].split(",")]
    at = lambda index: x.at([index[order.index(axis)] for axis in range(len(order))])  # noqa: E731
    to.scopes[-1][op.results[0]] = Value(op.result, at, True, None, x.base)


@lowers("tt.reshape")
def _reshaped(to: Program, op: Operation, number: int) -> None:
    (x,) = op.operands(to.value)
    if not x.type.shape:
        raise Unsupported(f"{to.name}: a scalar cannot be reshaped")
    held = to.hold(x)
    assert held.array is not None
    to.scopes[-1][op.results[0]] = to.held(op.result, held.array, x.base)


@lowers("tt.join")
def _joined(to: Program, op: Operation, number: int) -> None:
    a, b = (to.hold(one) for one in op.operands(to.value))
    to.define(op.results[0], Value(op.result, lambda index: f"({index[-1]} ? {b.at(index[:-1])} : {a.at(index[:-1])})", True))


@lowers("tt.split")
def _apart(to: Program, op: Operation, number: int) -> None:
    (x,) = op.operands(to.value)
    x = to.hold(x)
    for place, result in enumerate(op.results):
        type = Type(x.type.shape[:-1], x.type.element)
        to.define(result, Value(type, lambda index, place=place: x.at([*index, str(place)])))
