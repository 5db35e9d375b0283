"""A kernel's program while it is made: names, scratch, the lines of C++ so far, and the table of what lowers each operation.

A value is either *formed*, an expression of its place in the tile that is written where it is used (indices, pointers, masks, what is used
once), or *held*, an array of the program's scratch. Loads, products, reductions and what a loop carries are always held.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from headrace.kernels.triton_cpu.tile_ir import Index, Operation, Type, Unsupported, Value, parts

SHORT, LONGEST = 300, 3000
"""Signs of C++ above which an element that is used more than once, or once, is computed where it stands."""
DEEPEST = 3
"""Tiles of more dimensions are gone through by one loop; sorts make tiles of many dimensions of two."""


@dataclass(frozen=True, slots=True)
class Kernel:
    name: str
    arguments: list[tuple[str, str]]
    """Name and type (a pointer's begins with "*") of each, in the order in which they are passed."""
    lines: list[str]
    """Places in the source, which checks point into."""
    messages: list[str]
    """Those of assertions."""
    source: str


@dataclass(slots=True)
class Program:
    text: str
    code: list[str] = field(default_factory=list)
    declared: list[str] = field(default_factory=list)
    scopes: list[dict[str, Value]] = field(default_factory=lambda: [{}])
    owned: list[set[str]] = field(default_factory=lambda: [set()])
    """Arrays made in each open block."""
    blocks: dict[str, list[Value]] = field(default_factory=dict)
    """What branches to a block pass to it, by its label."""
    carried: list[set[str]] = field(default_factory=lambda: [set()])
    """What the loop whose body is each open block carries."""
    uses: Counter[str] = field(default_factory=Counter)
    places: dict[str, str] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    scratch: int = 0
    granule: int = 8
    """Bytes of the narrowest access."""
    count: int = 0
    name: str = ""
    arguments: list[tuple[str, str]] = field(default_factory=list)

    def kernel(self) -> Kernel:
        for line in self.text.splitlines():
            if match := re.match(r"(#loc\d*) = loc\((.*)\)\s*$", line):
                self.places[match[1]] = match[2]
            elif line.strip():
                self.body.append(line.strip())
        for line in self.body:
            self.uses.update(name.split("#")[0] for name in re.findall(r"%[\w$.-]+(?:#\d+)?", line.split(" = ", 1)[-1]))
        start = next(number for number, line in enumerate(self.body) if line.startswith("tt.func"))
        self._signature(self.body[start])
        self._block(start + 1, lambda names: None)
        return Kernel(self.name, self.arguments, self.lines, self.messages, self._source())

    # Names, scratch, places

    def value(self, name: str) -> Value:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        raise Unsupported(f"{self.name}: {name} is used before it is known")

    def fresh(self, prefix: str) -> str:
        self.count += 1
        return f"{prefix}{self.count}"

    def emit(self, line: str) -> None:
        self.code.append(line)

    def array(self, type: Type) -> str:
        """Scratch for a tile; in the innermost block."""
        name = self.fresh("t")
        self.declared.append(f"{type.c}* {name} = reinterpret_cast<{type.c}*>(scratch + {self.scratch});")
        self.scratch += -(-type.size * type.width // 64) * 64
        self.owned[-1].add(name)
        return name

    def held(self, type: Type, name: str, base: str = "-1") -> Value:
        return Value(type, lambda index: f"{name}[{flat(type.shape, index)}]", True, name, base)

    def hold(self, value: Value) -> Value:
        """The value as an array."""
        if value.array is not None or not value.type.shape:
            return value
        held = self.held(value.type, self.array(value.type), value.base)
        held.near = value.near
        self.each(value.type, lambda index: f"{held.at(index)} = {value.at(index)};")
        return held

    def scalar(self, type: Type, expression: str, base: str = "-1") -> Value:
        name = self.fresh("s")
        self.declared.append(f"{type.c} {name}{{}};")
        self.emit(f"{name} = {expression};")
        return Value(type, lambda index: name, True, None, base)

    def each(self, type: Type, statement: Callable[[Index], str], inner: int | None = None) -> None:
        """A statement for every element; the innermost loop runs along `inner`, if that is said."""
        if len(type.shape) > DEEPEST:
            self.emit(f"for (int i = 0; i < {type.size}; i++) {{ {statement(unravelled(type.shape))} }}")
            return
        index = [f"i{axis}" for axis in range(len(type.shape))]
        order = sorted(range(len(index)), key=lambda axis: axis == inner)
        loops = "".join(f"for (int {index[axis]} = 0; {index[axis]} < {type.shape[axis]}; {index[axis]}++) " for axis in order)
        self.emit(f"{loops}{{ {statement(index)} }}")

    def define(self, name: str, value: Value) -> None:
        """Give a result its name. It is computed now if it is a cheap scalar, long, or used again and dear; else where it is used."""
        if value.array is None:
            length = len(value.at([f"i{axis}" for axis in range(len(value.type.shape))]))
            long = length > (LONGEST if self.uses[name] == 1 else SHORT if value.cheap else 0)
            if value.type.shape and long:
                value = self.hold(value)
            elif not value.type.shape and (value.cheap or long):
                value = self.scalar(value.type, value.at([]), value.base)
        self.scopes[-1][name] = value

    def line_of(self, reference: str | None) -> int:
        """Where an operation stands in the source, as an index into `lines`."""
        seen = 0
        while reference in self.places and seen < 8:
            place = self.places[reference]
            if match := re.match(r'"(.*)":(\d+):(\d+)', place):
                said = f"{match[1]}:{match[2]}"
                if said not in self.lines:
                    self.lines.append(said)
                return self.lines.index(said)
            match = re.search(r"#loc\d*", place)
            reference, seen = match[0] if match else None, seen + 1
        if "an unknown line" not in self.lines:
            self.lines.append("an unknown line")
        return self.lines.index("an unknown line")

    # Structure

    def _signature(self, line: str) -> None:
        self.name = re.search(r"@([\w$.]+)", line)[1]  # type: ignore[index]
        pointers = 0
        for place, (name, kind) in enumerate(re.findall(r"%([\w$.-]+): (!tt\.ptr<[^>]*>|\w+)", line)):
            type = Type.parse(kind)
            self.arguments.append((name, "*" + type.element if type.pointer else type.element))
            self.scopes[0]["%" + name] = Value(
                type, lambda index, place=place: f"a{place}", True, None, str(pointers) if type.pointer else "-1"
            )
            pointers += type.pointer

    def _block(self, number: int, yields: Callable[[list[str]], None]) -> int:
        """Lower lines up to the block's end, whose number is returned."""
        while True:
            line = self.body[number]
            if line.startswith("}"):
                return number
            reference = re.search(r"loc\((#loc\d*)\)\s*\{?$", line)
            line = re.sub(r"\s*loc\([^()]*(?:\([^()]*\))*\)", "", line).rstrip()
            if match := re.match(r"\^(bb\d+)(?:\((.*)\))?:", line):
                self.emit(f"}} {match[1]}: {{")
                names = [one.split(":")[0] for one in parts(match[2])] if match[2] else []
                self.scopes[-1] |= zip(names, self.blocks.get(match[1], []), strict=True)
                number += 1
                continue
            match = re.match(r"(?:(%[\w$.-]+(?:, %[\w$.-]+)*)(?::(\d+))? = )?\"?([a-z]+\.[\w.]+)\"?(.*)$", line)
            if match is None:
                raise Unsupported(f"{self.name}: cannot read {line!r}")
            results = match[1].split(", ") if match[1] else []
            if match[2]:
                results = [f"{match[1]}#{place}" for place in range(int(match[2]))]
            operation = Operation(results, match[3], match[4].strip(), self.line_of(reference[1] if reference else None))
            if operation.name in ("scf.yield", "tt.reduce.return", "tt.scan.return", "scf.condition"):
                yields(re.findall(r"%[\w$.-]+(?:#\d+)?", operation.text.split(" : ")[0]))
                number += 1
                continue
            lowering = OPERATIONS.get(operation.name)
            if lowering is None:
                raise Unsupported(f"{self.name}: {operation.name} has no lowering on the CPU ({self.lines[operation.line]})")
            number = lowering(self, operation, number) or number + 1

    def nested(self, number: int, names: dict[str, Value], yields: Callable[[list[str]], None], carried: Iterable[str] = ()) -> int:
        """A block with names of its own."""
        self.scopes.append(names)
        self.owned.append(set())
        self.carried.append(set(carried))
        end = self._block(number, yields)
        self.carried.pop()
        self.owned.pop()
        self.scopes.pop()
        return end

    def _source(self) -> str:
        slots = []
        for place, (_, kind) in enumerate(self.arguments):
            type = Type((), kind.lstrip("*"), kind.startswith("*"))
            slots.append(f"{type.c} const a{place} = *reinterpret_cast<{type.c} const*>(slots + {place});")
        lines = [
            '#include "runtime.hpp"',
            "",
            "static void program(char* scratch, const int64_t* slots, int p0, int p1, int p2, int g0, int g1, int g2, Checks& checks) {",
            *slots,
            *self.declared,
            "{",
            *self.code,
            "}",
            "done:;",
            "}",
            "",
            'extern "C" void launch(const int64_t* slots, int g0, int g1, int g2, int threads,',
            "                       Extent* extents, int count, Found* found) {",
            f"    run<program, {max(64, self.scratch)}, {self.granule}>(slots, g0, g1, g2, threads, extents, count, found);",
            "}",
        ]
        return "\n".join(lines) + "\n"


def unravelled(shape: tuple[int, ...]) -> list[str]:
    """The index of element i. That of no other shape looks alike: the first axis has no remainder."""
    index, step, all = [], 1, math.prod(shape)
    for size in reversed(shape):
        index.append("0" if size == 1 else f"(i / {step})" if step * size == all else f"(i / {step} % {size})")
        step *= size
    return index[::-1]


def flat(shape: tuple[int, ...], index: Index) -> str:
    """The place of an element in a row-major array."""
    if len(shape) > DEEPEST and list(index) == unravelled(shape):
        return "i"
    terms, step = [], 1
    for size, i in reversed(list(zip(shape, index, strict=True))):
        if i != "0":
            terms.append(f"({i}) * {step}" if step > 1 else f"({i})")
        step *= size
    return " + ".join(reversed(terms)) or "0"


Lower = Callable[[Program, Operation, int], int | None]
OPERATIONS: dict[str, Lower] = {}
"""What lowers each operation: it defines its results, and returns the number of the next line where that is not the one below."""


def lowers(*names: str) -> Callable[[Lower], Lower]:
    def register(lowering: Lower) -> Lower:
        OPERATIONS.update(dict.fromkeys(names, lowering))
        return lowering

    return register
