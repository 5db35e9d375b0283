"""What stands on a tape before it is one: values, ops, which of them become one, and where the values lie.

A `Value` is what an op would give: so many floats a row, for rows that are not there yet. When all ops are known, so is who reads each
value. What one op alone reads of the one before it need not exist where a kernel does both:

    rmsnorm ─x─▶ quantize ─codes─▶ linear                    becomes   rmsnorm ─codes─▶ linear
    linear ─gate_up─▶ gated ─x─▶ quantize ─codes─▶ linear    becomes   linear_gated ─codes─▶ linear

Values that are never needed together share a place. `Recorder` makes the ops, and puts them on the native tape.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from headrace.kernels.cpu import _native
from headrace.kernels.cpu.packed import Packed

TOKENS, PICKS = 0, 1
"""The two kinds of rows: the step's tokens, and those of them that were picked."""


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """A matrix [rows, width] of every step to come: of float32, or of as many floats as hold the bytes of quantized rows."""

    rows: int
    """TOKENS or PICKS."""
    width: int


@dataclass(frozen=True, slots=True)
class Work:
    """What an op does in a step, for those who time it. A position is one that a row (operations) or a request (bytes) sees."""

    op: str
    shape: str = ""
    row_operations: int = 0
    position_operations: int = 0
    numbers: str = "f32"
    """What the operations are on: "f32", "int8" or "bf16"."""
    fixed_bytes: int = 0
    row_bytes: int = 0
    position_bytes: int = 0
    picked: bool = False
    """Whether its rows are those that were picked."""


@dataclass(frozen=True, slots=True)
class Op:
    """An op, and what it can become with its neighbours."""

    work: Work
    reads: tuple[Value, ...]
    writes: tuple[Value, ...]
    put: Callable[[_native.Program, Callable[[Value], _native.Place]], None]
    """Puts the op on the tape, given where its values stand."""
    factors: tuple[Value, Packed] | None = None
    """What a product multiplies, if these are codes and one part of a weight."""
    quantized: Callable[[Value, Packed], "Op"] | None = None
    """The same op, whose first result is the codes that are wanted in place of its floats."""
    after: Callable[["Op"], "Op | None"] = lambda _: None
    """Given the op before, whose first result this one reads and no other: a single op that does both, if there is one."""


def joined(ops: Sequence[Op], outputs: Sequence[Value]) -> list[Op]:
    """The same with one in place of neighbours that one kernel can do, without what the first gives to nobody but the second."""
    readers = Counter(outputs)
    readers.update(value for op in ops for value in op.reads)
    done: list[Op] = []
    for op in ops:
        while done and op.reads and op.reads[0] is done[-1].writes[0] and readers[op.reads[0]] == 1:
            if (both := op.after(done[-1])) is None:
                break
            done.pop()
            op = both
        done.append(op)
    return done


def places(ops: Sequence[Op], outputs: Sequence[Value]) -> tuple[dict[Value, int], list[int]]:
    """Where each value starts, the first gap that is free from its op to the last that reads it; and the size of either kind of rows, all
    in floats a row. `outputs` are kept to the end."""
    last = {value: index for index, op in enumerate(ops) for value in (*op.writes, *op.reads)}
    # What the picked rows are taken from is read whenever others are picked.
    last |= {value: len(ops) for value in outputs}
    last |= {value: len(ops) for op in ops for value in op.reads if op.writes[0].rows != value.rows}
    starts: dict[Value, int] = {}
    used, sizes = ([], []), [0, 0]
    for index, op in enumerate(ops):
        for value in op.writes:
            taken, size = used[value.rows], -(-value.width // _native.ALIGN) * _native.ALIGN
            start = 0
            for begin, end, _ in taken:
                if begin - start >= size:
                    break
                start = end
            starts[value] = start
            taken.append((start, start + size, value))
            taken.sort(key=lambda one: one[0])
            sizes[value.rows] = max(sizes[value.rows], start + size)
        for taken in used:
            taken[:] = [one for one in taken if last[one[2]] > index]
    return starts, sizes
