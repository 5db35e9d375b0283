"""Operations that place elements: ranges, shapes, what stands side by side. Most are views, which cost nothing; histograms count."""

import re

from headrace.kernels.triton_cpu.program import Program, lowers
from headrace.kernels.triton_cpu.tile_ir import Index, Operation, Type, Value


@lowers("tt.get_program_id", "tt.get_num_programs")
def _program(to: Program, op: Operation, number: int) -> None:
    axis = "xyz".index(op.text.split()[0])
    name = f"{'p' if op.name == 'tt.get_program_id' else 'g'}{axis}"
    to.scopes[-1][op.results[0]] = Value(Type((), "i32"), lambda index: name)


@lowers("tt.make_range")
def _range(to: Program, op: Operation, number: int) -> None:
    start = op.attribute("start")
    to.scopes[-1][op.results[0]] = Value(op.type, lambda index: f"({start} + {index[0]})" if start else index[0], near=0)


@lowers("tt.splat")
def _splat(to: Program, op: Operation, number: int) -> None:
    (x,) = op.operands(to.value)
    to.scopes[-1][op.results[0]] = Value(op.result, lambda index: x.at([]), True, None, x.base)


@lowers("tt.expand_dims")
def _expand(to: Program, op: Operation, number: int) -> None:
    (x,) = op.operands(to.value)
    axis = op.attribute("axis")
    near = None if x.near is None else x.near + (x.near >= axis)
    to.define(op.results[0], Value(op.result, lambda index: x.at([*index[:axis], *index[axis + 1 :]]), x.cheap, None, x.base, near))


@lowers("tt.broadcast")
def _broadcast(to: Program, op: Operation, number: int) -> None:
    (x,) = op.operands(to.value)
    x = x if x.cheap else to.hold(x)
    at = lambda index: x.at(["0" if size == 1 else i for size, i in zip(x.type.shape, index, strict=True)])  # noqa: E731
    to.scopes[-1][op.results[0]] = Value(op.result, at, True, None, x.base, x.near)


@lowers("tt.trans")
def _transposed(to: Program, op: Operation, number: int) -> None:
    (x,) = op.operands(to.value)
    x = to.hold(x)
    match = re.search(r"array<i32: ([\d, ]+)>", op.text)
    assert match, op.text
    order = [int(axis) for axis in match[1].split(",")]
    at = lambda index: x.at([index[order.index(axis)] for axis in range(len(order))])  # noqa: E731
    near = None if x.near is None else order.index(x.near)
    to.scopes[-1][op.results[0]] = Value(op.result, at, True, None, x.base, near)


@lowers("tt.reshape")
def _reshaped(to: Program, op: Operation, number: int) -> None:
    (x,) = op.operands(to.value)
    if x.type.size == 1:
        to.scopes[-1][op.results[0]] = Value(op.result, lambda index: x.at(["0"] * len(x.type.shape)), x.cheap, None, x.base)
        return
    held = to.hold(x)
    assert held.array is not None
    to.scopes[-1][op.results[0]] = to.held(op.result, held.array, x.base)


@lowers("tt.unsplat")
def _unsplat(to: Program, op: Operation, number: int) -> None:
    (x,) = op.operands(to.value)
    to.scopes[-1][op.results[0]] = to.scalar(Type((), x.type.element, x.type.pointer), x.at(["0"] * len(x.type.shape)), x.base)


@lowers("tt.cat")
def _cat(to: Program, op: Operation, number: int) -> None:
    a, b = (to.hold(one) for one in op.operands(to.value))
    held = to.held(op.result, to.array(op.result))
    for part, offset in ((a, 0), (b, a.type.size)):
        to.emit(f"std::memcpy({held.array} + {offset}, {part.array}, {part.type.size} * sizeof *{held.array});")
    to.scopes[-1][op.results[0]] = held


@lowers("tt.gather")
def _gather(to: Program, op: Operation, number: int) -> None:
    x, places = op.operands(to.value)
    x, axis = to.hold(x), op.attribute("axis")
    held = to.held(op.result, to.array(op.result))

    def at(index: Index) -> str:
        place = f"checks.place({places.at(index)}, {x.type.shape[axis]}, {op.line})"
        return f"{held.at(index)} = {x.at([*index[:axis], place, *index[axis + 1 :]])};"

    to.each(op.result, at)
    to.scopes[-1][op.results[0]] = held


@lowers("tt.histogram")
def _histogram(to: Program, op: Operation, number: int) -> None:
    x, *rest = op.operands(to.value)
    held = to.held(op.result, to.array(op.result))
    to.each(op.result, lambda index: f"{held.at(index)} = 0;")
    bins = op.result.shape[0]

    def count(index: Index) -> str:
        kept = f"{rest[0].at(index)} && " if rest else ""
        return f"const int64_t bin = {x.at(index)}; if ({kept}bin >= 0 && bin < {bins}) {held.array}[bin]++;"

    to.each(x.type, count)
    to.scopes[-1][op.results[0]] = held


@lowers("ttg.barrier", "llvm.intr.assume")
def _nothing(to: Program, op: Operation, number: int) -> None:
    """A program is one thread here, and takes the compiler's word for nothing."""


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
