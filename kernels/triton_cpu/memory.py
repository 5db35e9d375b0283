"""Operations on memory: pointers, loads, stores, atomics.

Every access says the line and the tensor that its pointer was made from, for checked launches.
"""

from collections.abc import Callable

from headrace.kernels.triton_cpu.program import Program, lowers
from headrace.kernels.triton_cpu.tile_ir import Index, Operation, Type, Value, parts


@lowers("tt.addptr")
def _addptr(to: Program, op: Operation, number: int) -> None:
    pointer, offset = op.operands(to.value)
    type, cheap = Type.parse(parts(op.types)[0]), pointer.cheap and offset.cheap
    near = pointer.near if offset.near is None else offset.near
    to.define(op.results[0], Value(type, lambda i: f"({pointer.at(i)} + {offset.at(i)})", cheap, None, pointer.base, near))


@lowers("tt.int_to_ptr")
def _address(to: Program, op: Operation, number: int) -> None:
    (x,) = op.operands(to.value)
    type = op.result
    to.define(op.results[0], Value(type, lambda index: f"reinterpret_cast<{type.c}>({x.at(index)})", x.cheap))


@lowers("tt.ptr_to_int")
def _number(to: Program, op: Operation, number: int) -> None:
    (x,) = op.operands(to.value)
    to.define(op.results[0], Value(op.result, lambda index: f"reinterpret_cast<{op.result.c}>({x.at(index)})", x.cheap))


def _element(to: Program, pointer: Value) -> Type:
    """What such pointers point to; the access is noted."""
    to.accessed(pointer.type, pointer.base)
    return Type(pointer.type.shape, pointer.type.element)


@lowers("tt.load")
def _load(to: Program, op: Operation, number: int) -> None:
    pointer, *rest = op.operands(to.value)
    type = _element(to, pointer)
    call = "watch" if "isVolatile = true" in op.text else "load"
    get = lambda index: f"{call}(checks, {pointer.at(index)}, {op.line}, {pointer.base})"  # noqa: E731
    mask, other = (rest[0] if rest else None), (rest[1] if len(rest) > 1 else None)
    if not type.shape:
        expression = get([])
        if mask is not None:
            expression = f"{mask.at([])} ? {expression} : {other.at([]) if other else type.c + '{}'}"
        to.scopes[-1][op.results[0]] = to.scalar(type, expression)
        return
    held = to.held(type, to.array(type))
    if mask is None:
        to.each(type, lambda index: f"{held.at(index)} = {get(index)};", pointer.near)
    else:
        # Where nothing is masked the loop has no branch, and vectors.
        masked = to.fresh("m")
        to.declared.append(f"int {masked}{{}};")
        to.emit(f"{masked} = 0;")
        to.each(type, lambda index: f"{masked} |= !({mask.at(index)});")
        to.emit(f"if ({masked} == 0)")
        to.each(type, lambda index: f"{held.at(index)} = {get(index)};", pointer.near)
        to.emit("else")
        none = lambda index: other.at(index) if other else f"{type.c}{{}}"  # noqa: E731
        to.each(type, lambda index: f"{held.at(index)} = {mask.at(index)} ? {get(index)} : {none(index)};", pointer.near)
    to.scopes[-1][op.results[0]] = held


@lowers("tt.store")
def _store(to: Program, op: Operation, number: int) -> None:
    pointer, value, *rest = op.operands(to.value)
    type = _element(to, pointer)
    store = lambda index: f"store(checks, {pointer.at(index)}, {value.at(index)}, {op.line}, {pointer.base});"  # noqa: E731
    guarded = (lambda index: f"if ({rest[0].at(index)}) {store(index)}") if rest else store
    if type.shape:
        to.each(type, guarded, pointer.near)
    else:
        to.emit(guarded([]))


NEXT = {
    "add": "a + {v}",
    "fadd": "a + {v}",
    "and": "a & {v}",
    "or": "a | {v}",
    "xor": "a ^ {v}",
    "max": "a > {v} ? a : {v}",
    "min": "a < {v} ? a : {v}",
    "umax": "unsigned_of(a) > unsigned_of({v}) ? a : {v}",
    "umin": "unsigned_of(a) < unsigned_of({v}) ? a : {v}",
    "exch": "{v}",
}
"""What an atomic makes of an element `a` and its operand `v`."""
ORDERS = {"relaxed": "__ATOMIC_RELAXED", "acquire": "__ATOMIC_ACQUIRE", "release": "__ATOMIC_RELEASE", "acq_rel": "__ATOMIC_ACQ_REL"}


@lowers("tt.atomic_rmw")
def _atomic(to: Program, op: Operation, number: int) -> None:
    kind, sem, scope = (word.strip() for word in op.text.split(",")[:3])
    pointer, value, *rest = op.operands(to.value)
    order = f"{ORDERS[sem]}, {str(scope != 'cta').lower()}"

    def call(index: Index) -> str:
        changed = NEXT[kind].format(v="v")
        value_type = value.type.c
        return (
            f"update<{order}>(checks, {pointer.at(index)}, {op.line}, {pointer.base}, "
            f"[v = static_cast<{value_type}>({value.at(index)})](auto a) {{ return {changed}; }})"
        )

    _done(to, op, pointer, call, rest[0] if rest else None)


@lowers("tt.atomic_cas")
def _exchanged(to: Program, op: Operation, number: int) -> None:
    sem, scope = (word.strip() for word in op.text.split(",")[:2])
    pointer, expected, value = op.operands(to.value)
    order = f"{ORDERS[sem]}, {str(scope != 'cta').lower()}"

    def call(index: Index) -> str:
        operands = f"{pointer.at(index)}, {expected.at(index)}, {value.at(index)}"
        return f"exchange_if<{order}>(checks, {operands}, {op.line}, {pointer.base})"

    _done(to, op, pointer, call, None)


def _done(to: Program, op: Operation, pointer: Value, call: Callable[[Index], str], mask: Value | None) -> None:
    """An atomic is done where it stands and once, element by element; what it returns where it is masked is 0."""
    type = _element(to, pointer)
    at = (lambda index: f"{mask.at(index)} ? {call(index)} : {type.c}{{}}") if mask is not None else call
    if not type.shape:
        to.scopes[-1][op.results[0]] = to.scalar(type, at([]))
        return
    held = to.held(type, to.array(type))
    to.each(type, lambda index: f"{held.at(index)} = {at(index)};")
    to.scopes[-1][op.results[0]] = held
