"""Products of tiles."""

from headrace.kernels.triton_cpu.program import Program, lowers
from headrace.kernels.triton_cpu.tile_ir import ROUNDED, Operation, Unsupported


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
