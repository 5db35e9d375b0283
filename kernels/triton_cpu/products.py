"""Products of tiles, and of batches of them: every sum is a chain over K in order."""

import math
import re

from headrace.kernels.triton_cpu.program import Program, lowers
from headrace.kernels.triton_cpu.tile_ir import ROUNDED, Operation, Value


@lowers("tt.dot")
def _dot(to: Program, op: Operation, number: int) -> None:
    a, b, c = op.operands(to.value)
    *batch, m, k = a.type.shape
    n = b.type.shape[-1]
    left, right = _rows(to, a), _rows(to, b)
    name = re.findall(r"%[\w$.-]+", op.text.split(" : ")[0])[2]
    if name in to.carried[-1] and to.uses[name] == 2:  # where the loop names it, and here
        held = c  # nobody else sees what the loop carries here: the product is added to it in place
    else:
        held = to.held(op.result, to.array(op.result))
        to.each(op.result, lambda index: f"{held.at(index)} = {c.at(index)};")
    to.emit(f"for (int i = 0; i < {math.prod(batch)}; i++)")
    to.emit(f"add_product<{m}, {n}, {k}>({left} + i * {m * k}, {right} + i * {k * n}, {held.array} + i * {m * n});")
    if op.result.element in ROUNDED:
        to.each(op.result, lambda index: f"{held.at(index)} = {op.result.rounded(held.at(index))};")
    to.scopes[-1][op.results[0]] = held


def _rows(to: Program, value: Value) -> str:
    """The array of a tile, row by row; what is transposed is a view, and copied."""
    plain = to.hold(value)
    assert plain.array is not None
    corner = ["1"] * len(plain.type.shape)
    if plain.at(corner) != to.held(plain.type, plain.array).at(corner):
        plain = to.hold(Value(plain.type, plain.at))
    return plain.array or ""
