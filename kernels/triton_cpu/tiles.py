"""Operations on tiles: their shapes, what is loaded and stored, products and reductions."""

import re

from headrace.kernels.triton_cpu.program import Program, lowers
from headrace.kernels.triton_cpu.tile_ir import ROUNDED, Operation, Type, Unsupported, Value, parts


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


@lowers("tt.addptr")
def _addptr(to: Program, op: Operation, number: int) -> None:
    pointer, offset = op.operands(to.value)
    type = Type.parse(parts(op.types)[0])
    to.define(
        op.results[0], Value(type, lambda i: f"({pointer.at(i)} + {offset.at(i)})", pointer.cheap and offset.cheap, None, pointer.base)
    )


@lowers("tt.load")
def _load(to: Program, op: Operation, number: int) -> None:
    pointer, *rest = op.operands(to.value)
    pointers = op.type
    type = Type(pointers.shape, pointers.element)
    get = lambda index: f"LOAD({pointer.at(index)}, {op.line}, {pointer.base})"  # noqa: E731
    mask, other = (rest[0] if rest else None), (rest[1] if len(rest) > 1 else None)
    if not type.shape:
        expression = get([])
        if mask is not None:
            expression = f"{mask.at([])} ? {expression} : {other.at([]) if other else type.c + '{}'}"
        to.scopes[-1][op.results[0]] = to.scalar(type, expression)
        return
    held = to.held(type, to.array(type))
    if mask is None:
        to.each(type, lambda index: f"{held.at(index)} = {get(index)};")
    else:
        # Where nothing is masked the loop has no branch, and vectors.
        every = to.fresh("m")
        to.declared.append(f"bool {every}{{}};")
        to.emit(f"{every} = true;")
        to.each(type, lambda index: f"{every} &= {mask.at(index)};")
        to.emit(f"if ({every})")
        to.each(type, lambda index: f"{held.at(index)} = {get(index)};")
        to.emit("else")
        to.each(type, lambda index: f"{held.at(index)} = {mask.at(index)} ? {get(index)} : {other.at(index) if other else type.c + '{}'};")
    to.scopes[-1][op.results[0]] = held


@lowers("tt.store")
def _store(to: Program, op: Operation, number: int) -> None:
    pointer, value, *rest = op.operands(to.value)
    type = op.type
    store = lambda index: f"STORE({pointer.at(index)}, {value.at(index)}, {op.line}, {pointer.base});"  # noqa: E731
    guarded = (lambda index: f"if ({rest[0].at(index)}) {store(index)}") if rest else store
    if type.shape:
        to.each(type, guarded)
    else:
        to.emit(guarded([]))


@lowers("tt.dot")
def _dot(to: Program, op: Operation, number: int) -> None:
    a, b, c = op.operands(to.value)
    a, b = to.hold(a), to.hold(b)
    if len(a.type.shape) != 2:
        raise Unsupported(f"{to.name}: a product of {len(a.type.shape)} dimensions has no lowering on the CPU ({to.lines[op.line]})")
    (m, k), n = a.type.shape, b.type.shape[1]
    # A transposed operand is a view: the product reads rows.
    arrays = []
    for one in (a, b):
        plain = one if one.array is not None else None
        if plain is None or one.at(["1", "1"]) != to.held(one.type, plain.array or "").at(["1", "1"]):
            copy = to.held(one.type, to.array(one.type))
            to.each(one.type, lambda index, copy=copy, one=one: f"{copy.at(index)} = {one.at(index)};")
            plain = copy
        arrays.append(plain.array)
    held = to.held(op.result, to.array(op.result))
    to.each(op.result, lambda index: f"{held.at(index)} = {c.at(index)};")
    to.emit(f"add_product<{m}, {n}, {k}>({arrays[0]}, {arrays[1]}, {held.array});")
    if op.result.element in ROUNDED:
        to.each(op.result, lambda index: f"{held.at(index)} = {op.result.rounded(held.at(index))};")
    to.scopes[-1][op.results[0]] = held


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
