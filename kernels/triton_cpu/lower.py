"""From Triton's tile IR to C++: a program of the grid becomes a function of loops over tiles.

    %s = arith.mulf %a, %b : tensor<64x64xf32>     for i0, for i1: s[i0 * 64 + i1] = a[…] * b[…]

A value is either *formed*, an expression of its place in the tile that is written where it is used (indices, pointers, masks, what is used
once), or *held*, an array of the program's scratch. Loads, products, reductions and what a loop carries are always held. The text of the
IR is read, an operation a line, since Triton's bindings show no constants. `OPERATIONS` has a function for each operation; what has none is
refused by name.
"""

import re
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

STORED = {
    "f32": "float",
    "f64": "double",
    "bf16": "bf16",
    "f16": "f16",
    "f8E4M3FN": "f8e4m3",
    "f8E5M2": "f8e5m2",
    "i64": "int64_t",
    "i32": "int32_t",
    "i16": "int16_t",
    "i8": "int8_t",
    "i1": "int8_t",
}
"""How elements lie in memory, by the IR's name."""
ROUNDED = {"bf16": "round_bf16", "f16": "round_f16", "f8E4M3FN": "round_f8e4m3", "f8E5M2": "round_f8e5m2"}
"""Floats that are float in a program, and what rounds them."""

Index = Sequence[str]


class Unsupported(Exception):
    """An operation that has no lowering. The text names it, the kernel and the line."""


@dataclass(frozen=True, slots=True)
class Type:
    shape: tuple[int, ...]
    element: str
    pointer: bool = False

    @classmethod
    def parse(cls, text: str) -> "Type":
        text = text.strip()
        shape: tuple[int, ...] = ()
        if match := re.fullmatch(r"tensor<((?:\d+x)*)(.*)>", text):
            shape, text = tuple(int(size) for size in match[1].split("x")[:-1]), match[2]
        if match := re.fullmatch(r"!tt\.ptr<([^,>]*)(?:, \d+)?>", text):
            return cls(shape, match[1], True)
        return cls(shape, "i64" if text == "index" else text)

    @property
    def size(self) -> int:
        size = 1
        for one in self.shape:
            size *= one
        return size

    @property
    def is_float(self) -> bool:
        return not self.pointer and self.element[0] in "fb"

    @property
    def c(self) -> str:
        """The C++ type of an element in a program."""
        if self.pointer:
            return f"{STORED[self.element]}*"
        return "float" if self.element in ROUNDED else "bool" if self.element == "i1" else STORED[self.element]

    def rounded(self, expression: str) -> str:
        return f"{ROUNDED[self.element]}({expression})" if not self.pointer and self.element in ROUNDED else expression


@dataclass(slots=True)
class Value:
    type: Type
    at: Callable[[Index], str]
    """The C++ of an element."""
    cheap: bool = True
    """May be written as often as it is used."""
    array: str | None = None
    """The name of the array that holds it."""
    base: int = -1
    """For pointers: the argument they were made from."""


@dataclass(slots=True)
class Operation:
    """A line of the IR."""

    results: list[str]
    name: str
    text: str
    """Behind the name, without results and location."""
    line: int
    """Index into the kernel's lines."""

    def operands(self, values: Callable[[str], Value]) -> list[Value]:
        head = self.text.split(" : ")[0]
        return [values(name) for name in re.findall(r"%[\w$.-]+(?:#\d+)?", head)]

    @property
    def types(self) -> str:
        return self.text.rsplit(" : ", 1)[-1]

    @property
    def type(self) -> Type:
        """Of an operation that says one type: that of its operands, and mostly of its result."""
        return Type.parse(self.types)

    @property
    def result(self) -> Type:
        """Behind `->` or `to`."""
        return Type.parse(re.split(r" -> | to ", self.types)[-1])

    def attribute(self, name: str) -> int:
        match = re.search(rf"\b{name} = (-?\d+)", self.text)
        assert match, f"{self.name} without {name}: {self.text}"
        return int(match[1])


@dataclass(frozen=True, slots=True)
class Kernel:
    name: str
    arguments: list[tuple[str, str]]
    """Name and type (a pointer's begins with "*") of each, in the order in which they are passed."""
    lines: list[str]
    """Places in the source, which checks point into."""
    source: str


def lower(text: str) -> Kernel:
    """The C++ of a module with one kernel."""
    return _Lowering(text).kernel()


@dataclass(slots=True)
class _Lowering:
    text: str
    code: list[str] = field(default_factory=list)
    declared: list[str] = field(default_factory=list)
    scopes: list[dict[str, Value]] = field(default_factory=lambda: [{}])
    owned: list[set[str]] = field(default_factory=lambda: [set()])
    """Arrays made in each open block."""
    uses: Counter[str] = field(default_factory=Counter)
    places: dict[str, str] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    scratch: int = 0
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
        return Kernel(self.name, self.arguments, self.lines, self._source())

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
        self.scratch += -(-type.size * 8 // 64) * 64
        self.owned[-1].add(name)
        return name

    def held(self, type: Type, name: str, base: int = -1) -> Value:
        return Value(type, lambda index: f"{name}[{_flat(type.shape, index)}]", True, name, base)

    def hold(self, value: Value) -> Value:
        """The value as an array."""
        if value.array is not None or not value.type.shape:
            return value
        held = self.held(value.type, self.array(value.type), value.base)
        self.each(value.type, lambda index: f"{held.at(index)} = {value.at(index)};")
        return held

    def scalar(self, type: Type, expression: str, base: int = -1) -> Value:
        name = self.fresh("s")
        self.declared.append(f"{type.c} {name}{{}};")
        self.emit(f"{name} = {expression};")
        return Value(type, lambda index: name, True, None, base)

    def each(self, type: Type, statement: Callable[[Index], str]) -> None:
        """A statement for every element."""
        index = [f"i{axis}" for axis in range(len(type.shape))]
        loops = "".join(f"for (int {i} = 0; {i} < {size}; {i}++) " for i, size in zip(index, type.shape, strict=True))
        self.emit(f"{loops}{{ {statement(index)} }}")

    def define(self, name: str, value: Value) -> None:
        """Give a result its name: scalars are computed now, tiles that are not cheap where they are used, if that is once."""
        if not value.type.shape:
            if value.array is None and value.cheap:
                value = self.scalar(value.type, value.at([]), value.base)
        elif not value.cheap and self.uses[name] > 1:
            value = self.hold(value)
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
        for place, (name, kind) in enumerate(re.findall(r"%([\w$.-]+): (!tt\.ptr<[^>]*>|\w+)", line)):
            type = Type.parse(kind)
            self.arguments.append((name, "*" + type.element if type.pointer else type.element))
            self.scopes[0]["%" + name] = Value(type, lambda index, place=place: f"a{place}", True, None, place if type.pointer else -1)

    def _block(self, number: int, yields: Callable[[list[str]], None]) -> int:
        """Lower lines up to the block's end, whose number is returned."""
        while True:
            line = self.body[number]
            if line.startswith("}"):
                return number
            reference = re.search(r"loc\((#loc\d*)\)\s*\{?$", line)
            line = re.sub(r"\s*loc\([^()]*(?:\([^()]*\))*\)", "", line).rstrip()
            if match := re.match(r"\^(bb\d+)", line):
                self.emit(f"}} {match[1]}: {{")
                number += 1
                continue
            match = re.match(r"(?:(%[\w$.-]+)(?::(\d+))? = )?\"?([a-z]+\.[\w.]+)\"?(.*)$", line)
            if match is None:
                raise Unsupported(f"{self.name}: cannot read {line!r}")
            results = [match[1]] if match[1] else []
            if match[2]:
                results = [f"{match[1]}#{place}" for place in range(int(match[2]))]
            operation = Operation(results, match[3], match[4].strip(), self.line_of(reference[1] if reference else None))
            if operation.name in ("scf.yield", "tt.reduce.return", "scf.condition"):
                yields(re.findall(r"%[\w$.-]+(?:#\d+)?", operation.text.split(" : ")[0]))
                number += 1
                continue
            lowering = OPERATIONS.get(operation.name)
            if lowering is None:
                raise Unsupported(f"{self.name}: {operation.name} has no lowering on the CPU ({self.lines[operation.line]})")
            number = lowering(self, operation, number) or number + 1

    def nested(self, number: int, names: dict[str, Value], yields: Callable[[list[str]], None]) -> int:
        """A block with names of its own."""
        self.scopes.append(names)
        self.owned.append(set())
        end = self._block(number, yields)
        self.owned.pop()
        self.scopes.pop()
        return end

    def _source(self) -> str:
        slots = []
        for place, (_, kind) in enumerate(self.arguments):
            type = Type((), kind.lstrip("*"), kind.startswith("*"))
            slots.append(f"{type.c} const a{place} = *reinterpret_cast<{type.c} const*>(slots + {place});")
        size = max(64, self.scratch)
        lines = [
            '#include "runtime.hpp"',
            "",
            "static void program(char* scratch, const int64_t* slots, int p0, int p1, int p2, int g0, int g1, int g2, Checks checks) {",
            *slots,
            *self.declared,
            "{",
            *self.code,
            "}",
            "done:;",
            "}",
            "",
            'extern "C" void launch(const int64_t* slots, int g0, int g1, int g2, int threads,',
            "                       const Extent* extents, int count, Found* found) {",
            "    const int64_t all = static_cast<int64_t>(g0) * g1 * g2;",
            "#pragma omp parallel num_threads(all < threads ? static_cast<int>(all) : threads)",
            "    {",
            f"        char* scratch = static_cast<char*>(std::aligned_alloc(64, {size}));",
            "#pragma omp for schedule(dynamic)",
            "        for (int64_t i = 0; i < all; i++) {",
            "#ifdef HEADRACE_TRITON_CHECKED",
            f"            std::memset(scratch, 255, {size});",
            "            const Checks checks{extents, count, found, static_cast<int>(i)};",
            "#else",
            "            const Checks checks{};",
            "#endif",
            "            program(scratch, slots, i % g0, i / g0 % g1, i / g0 / g1, g0, g1, g2, checks);",
            "        }",
            "        std::free(scratch);",
            "    }",
            "}",
        ]
        return "\n".join(lines) + "\n"


def _flat(shape: tuple[int, ...], index: Index) -> str:
    """The place of an element in a row-major array."""
    terms, step = [], 1
    for size, i in reversed(list(zip(shape, index, strict=True))):
        if i != "0":
            terms.append(f"({i}) * {step}" if step > 1 else f"({i})")
        step *= size
    return " + ".join(reversed(terms)) or "0"


Lower = Callable[[_Lowering, Operation, int], int | None]
OPERATIONS: dict[str, Lower] = {}
"""What lowers each operation: it defines its results, and returns the number of the next line where that is not the one below."""


def lowers(*names: str) -> Callable[[Lower], Lower]:
    def register(lowering: Lower) -> Lower:
        OPERATIONS.update(dict.fromkeys(names, lowering))
        return lowering

    return register


def _unsigned(type: Type, expression: str) -> str:
    return f"static_cast<u{type.c}>({expression})" if type.element != "i1" else expression


INFIX = {
    "arith.addf": "+",
    "arith.subf": "-",
    "arith.mulf": "*",
    "arith.divf": "/",
    "arith.addi": "+",
    "arith.subi": "-",
    "arith.muli": "*",
    "arith.divsi": "/",
    "arith.remsi": "%",
    "arith.andi": "&",
    "arith.ori": "|",
    "arith.xori": "^",
    "arith.shli": "<<",
    "arith.shrsi": ">>",
    "arith.shrui": ">>",
    "arith.divui": "/",
    "arith.remui": "%",
    "tt.precise_divf": "/",
}
"""Operations of two operands of one type."""
OF_UNSIGNED = {"arith.shrui", "arith.divui", "arith.remui"}
COSTLY = {"arith.divsi", "arith.remsi", "arith.divui", "arith.remui"}


@lowers(*INFIX)
def _infix(to: _Lowering, op: Operation, number: int) -> None:
    left, right = op.operands(to.value)
    type, sign = op.type, INFIX[op.name]

    def at(index: Index) -> str:
        a, b = left.at(index), right.at(index)
        if op.name in OF_UNSIGNED:
            a, b = _unsigned(type, a), _unsigned(type, b)
        return type.rounded(f"({a} {sign} {b})") if type.is_float else f"static_cast<{type.c}>({a} {sign} {b})"

    value = Value(type, at, left.cheap and right.cheap and not type.is_float)
    if op.name in COSTLY and type.shape:
        value = to.hold(value)
    to.define(op.results[0], value)


CHOSEN = {
    "arith.maxsi": ">",
    "arith.minsi": "<",
    "arith.maxui": ">",
    "arith.minui": "<",
    "arith.maxnumf": ">",
    "arith.minnumf": "<",
    "arith.maximumf": ">",
    "arith.minimumf": "<",
}


@lowers(*CHOSEN)
def _chosen(to: _Lowering, op: Operation, number: int) -> None:
    left, right = (one if one.cheap else to.hold(one) for one in op.operands(to.value))
    type, sign = op.type, CHOSEN[op.name]

    def at(index: Index) -> str:
        a, b = left.at(index), right.at(index)
        if op.name.endswith("ui"):
            return f"({_unsigned(type, a)} {sign} {_unsigned(type, b)} ? {a} : {b})"
        if op.name.endswith("imumf"):  # a NaN wins
            return f"({a} != {a} || {a} {sign} {b} ? {a} : {b})"
        # Of a NaN and a number, the number.
        return f"({a} {sign} {b} || {b} != {b} ? {a} : {b})" if type.is_float else f"({a} {sign} {b} ? {a} : {b})"

    to.define(op.results[0], Value(type, at, not type.is_float))


PREDICATES = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}


@lowers("arith.cmpi", "arith.cmpf")
def _compared(to: _Lowering, op: Operation, number: int) -> None:
    kind, rest = op.text.split(", ", 1)
    left, right = Operation([], "", rest, 0).operands(to.value)
    type = op.type
    sign = PREDICATES[kind[-2:]]

    def at(index: Index) -> str:
        a, b = left.at(index), right.at(index)
        if not type.is_float and kind[0] == "u":
            a, b = _unsigned(type, a), _unsigned(type, b)
        said = f"({a} {sign} {b})"
        if type.is_float and kind[0] == "u" and kind != "une":
            return f"({a} != {a} || {b} != {b} || {said})"
        if kind == "one":
            return f"({a} == {a} && {b} == {b} && {said})"
        return said

    to.define(op.results[0], Value(Type(type.shape, "i1"), at, left.cheap and right.cheap))


@lowers("arith.select")
def _select(to: _Lowering, op: Operation, number: int) -> None:
    choice, yes, no = op.operands(to.value)
    type = Type.parse(_parts(op.types)[-1])
    one = not choice.type.shape and bool(type.shape)
    to.define(
        op.results[0],
        Value(
            type,
            lambda index: f"({choice.at([] if one else index)} ? {yes.at(index)} : {no.at(index)})",
            choice.cheap and yes.cheap and no.cheap and not type.is_float,
            None,
            yes.base,
        ),
    )


CALLS = {
    "math.exp": "exp_of",
    "math.exp2": "exp2_of",
    "math.log": "std::log",
    "math.log2": "std::log2",
    "math.sqrt": "std::sqrt",
    "tt.precise_sqrt": "std::sqrt",
    "math.rsqrt": "1.0f / std::sqrt",
    "math.absf": "std::fabs",
    "math.absi": "std::abs",
    "math.floor": "std::floor",
    "math.ceil": "std::ceil",
    "math.sin": "std::sin",
    "math.cos": "std::cos",
    "math.erf": "std::erf",
    "math.tanh": "std::tanh",
    "arith.negf": "-",
}


@lowers(*CALLS)
def _called(to: _Lowering, op: Operation, number: int) -> None:
    (x,) = op.operands(to.value)
    type, call = op.type, CALLS[op.name]
    to.define(op.results[0], Value(type, lambda index: type.rounded(f"({call}({x.at(index)}))"), False))


@lowers("math.fma")
def _fma(to: _Lowering, op: Operation, number: int) -> None:
    a, b, c = op.operands(to.value)
    type = op.type
    to.define(op.results[0], Value(type, lambda i: type.rounded(f"__builtin_fmaf({a.at(i)}, {b.at(i)}, {c.at(i)})"), False))


@lowers("tt.clampf")
def _clamp(to: _Lowering, op: Operation, number: int) -> None:
    x, low, high = op.operands(to.value)
    x = to.hold(x)
    to.define(op.results[0], Value(op.type, lambda i: f"std::fmin(std::fmax({x.at(i)}, {low.at(i)}), {high.at(i)})", False))


@lowers("tt.mulhiui")
def _mulhiui(to: _Lowering, op: Operation, number: int) -> None:
    a, b = op.operands(to.value)
    to.define(op.results[0], Value(op.type, lambda i: f"high_product<{op.type.c}>({a.at(i)}, {b.at(i)})", a.cheap and b.cheap))


@lowers(
    "arith.extf",
    "arith.truncf",
    "arith.extsi",
    "arith.extui",
    "arith.trunci",
    "arith.sitofp",
    "arith.uitofp",
    "arith.fptosi",
    "arith.fptoui",
    "arith.index_cast",
    "tt.fp_to_fp",
)
def _converted(to: _Lowering, op: Operation, number: int) -> None:
    (x,) = op.operands(to.value)
    type = op.result

    def at(index: Index) -> str:
        expression = x.at(index)
        if op.name in ("arith.extui", "arith.uitofp"):
            expression = _unsigned(x.type, expression)
        elif op.name in ("arith.extsi", "arith.sitofp") and x.type.element == "i1":
            expression = f"-static_cast<int>({expression})"
        return type.rounded(f"static_cast<{type.c}>({expression})")

    to.define(op.results[0], Value(type, at, x.cheap and not type.is_float))


@lowers("arith.bitcast", "tt.bitcast")
def _bitcast(to: _Lowering, op: Operation, number: int) -> None:
    (x,) = op.operands(to.value)
    type = op.result
    if type.pointer or x.type.element in ROUNDED or type.element in ROUNDED:
        if not type.pointer:
            raise Unsupported(f"{to.name}: a bitcast of {x.type.element} to {type.element} has no lowering on the CPU")
        to.define(op.results[0], Value(type, lambda index: f"reinterpret_cast<{type.c}>({x.at(index)})", x.cheap, None, x.base))
        return
    to.define(op.results[0], Value(type, lambda index: f"__builtin_bit_cast({type.c}, {x.at(index)})", x.cheap))


@lowers("arith.constant")
def _constant(to: _Lowering, op: Operation, number: int) -> None:
    match = re.fullmatch(r"(?:\{.*?\} )?(?:dense<(.*?)>|(\S+))(?: : (.*))?", op.text)
    assert match, op.text
    text, type = match[1] or match[2], Type.parse(match[3] or "i1")
    if text in ("true", "false"):
        literal = text
    elif type.is_float:
        literal = _float(text, type)
    else:
        literal = f"static_cast<{type.c}>({text}LL)"
    to.scopes[-1][op.results[0]] = Value(type, lambda index: literal, True)


def _float(text: str, type: Type) -> str:
    if not text.startswith("0x"):
        return f"{text}f" if type.c == "float" else text
    bits = int(text, 16)
    if type.element == "bf16":
        bits <<= 16
    elif type.element == "f16":
        (bits,) = struct.unpack("<I", struct.pack("<f", struct.unpack("<e", struct.pack("<H", bits))[0]))
    elif type.element != "f32":
        raise Unsupported(f"a constant {text} of {type.element} has no lowering on the CPU")
    return f"float_of({bits:#x}u)"


@lowers("tt.get_program_id", "tt.get_num_programs")
def _program(to: _Lowering, op: Operation, number: int) -> None:
    axis = "xyz".index(op.text.split()[0])
    name = f"{'p' if op.name == 'tt.get_program_id' else 'g'}{axis}"
    to.scopes[-1][op.results[0]] = Value(Type((), "i32"), lambda index: name)


@lowers("tt.make_range")
def _range(to: _Lowering, op: Operation, number: int) -> None:
    start = op.attribute("start")
    to.scopes[-1][op.results[0]] = Value(op.type, lambda index: f"({start} + {index[0]})" if start else index[0])


@lowers("tt.splat")
def _splat(to: _Lowering, op: Operation, number: int) -> None:
    (x,) = op.operands(to.value)
    to.scopes[-1][op.results[0]] = Value(op.result, lambda index: x.at([]), True, None, x.base)


@lowers("tt.expand_dims")
def _expand(to: _Lowering, op: Operation, number: int) -> None:
    (x,) = op.operands(to.value)
    axis = op.attribute("axis")
    to.define(op.results[0], Value(op.result, lambda index: x.at([*index[:axis], *index[axis + 1 :]]), x.cheap, None, x.base))


@lowers("tt.broadcast")
def _broadcast(to: _Lowering, op: Operation, number: int) -> None:
    (x,) = op.operands(to.value)
    x = x if x.cheap else to.hold(x)
    at = lambda index: x.at(["0" if size == 1 else i for size, i in zip(x.type.shape, index, strict=True)])  # noqa: E731
    to.scopes[-1][op.results[0]] = Value(op.result, at, True, None, x.base)


@lowers("tt.trans")
def _transposed(to: _Lowering, op: Operation, number: int) -> None:
    (x,) = op.operands(to.value)
    x = to.hold(x)
    match = re.search(r"array<i32: ([\d, ]+)>", op.text)
    assert match, op.text
    order = [int(axis) for axis in match[1].split(",")]
    at = lambda index: x.at([index[order.index(axis)] for axis in range(len(order))])  # noqa: E731
    to.scopes[-1][op.results[0]] = Value(op.result, at, True, None, x.base)


@lowers("tt.reshape")
def _reshaped(to: _Lowering, op: Operation, number: int) -> None:
    (x,) = op.operands(to.value)
    if not x.type.shape:
        raise Unsupported(f"{to.name}: a scalar cannot be reshaped")
    held = to.hold(x)
    assert held.array is not None
    to.scopes[-1][op.results[0]] = to.held(op.result, held.array, x.base)


@lowers("tt.join")
def _joined(to: _Lowering, op: Operation, number: int) -> None:
    a, b = (to.hold(one) for one in op.operands(to.value))
    to.define(op.results[0], Value(op.result, lambda index: f"({index[-1]} ? {b.at(index[:-1])} : {a.at(index[:-1])})", True))


@lowers("tt.split")
def _apart(to: _Lowering, op: Operation, number: int) -> None:
    (x,) = op.operands(to.value)
    x = to.hold(x)
    for place, result in enumerate(op.results):
        type = Type(x.type.shape[:-1], x.type.element)
        to.define(result, Value(type, lambda index, place=place: x.at([*index, str(place)])))


@lowers("tt.addptr")
def _addptr(to: _Lowering, op: Operation, number: int) -> None:
    pointer, offset = op.operands(to.value)
    type = Type.parse(_parts(op.types)[0])
    to.define(
        op.results[0], Value(type, lambda i: f"({pointer.at(i)} + {offset.at(i)})", pointer.cheap and offset.cheap, None, pointer.base)
    )


@lowers("tt.load")
def _load(to: _Lowering, op: Operation, number: int) -> None:
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
def _store(to: _Lowering, op: Operation, number: int) -> None:
    pointer, value, *rest = op.operands(to.value)
    type = op.type
    store = lambda index: f"STORE({pointer.at(index)}, {value.at(index)}, {op.line}, {pointer.base});"  # noqa: E731
    guarded = (lambda index: f"if ({rest[0].at(index)}) {store(index)}") if rest else store
    if type.shape:
        to.each(type, guarded)
    else:
        to.emit(guarded([]))


@lowers("tt.dot")
def _dot(to: _Lowering, op: Operation, number: int) -> None:
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
def _reduced(to: _Lowering, op: Operation, number: int) -> int:
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


@lowers("scf.for")
def _for(to: _Lowering, op: Operation, number: int) -> int:
    match = re.match(r"(%\S+) = (%\S+) to (%\S+) step (%\S+?)(?: iter_args\((.*?)\) -> \((.*)\))?\s*(?:: (\w+))? \{", op.text)
    assert match, op.text
    variable, (begin, end, step) = match[1], [to.value(name) for name in match.group(2, 3, 4)]
    carried = [pair.split(" = ") for pair in _parts(match[5])] if match[5] else []
    types = [Type.parse(type) for type in _parts(match[6])] if match[6] else []
    inside: dict[str, Value] = {}
    cells = []
    for (name, first), type in zip(carried, types, strict=True):
        cells.append(_cell(to, type, to.value(first)))
        inside[name] = cells[-1]
    counter = to.fresh("n")
    kind = Type((), match[7] or "i32")
    inside[variable] = Value(kind, lambda index: counter)
    to.emit(f"for ({kind.c} {counter} = {begin.at([])}; {counter} < {end.at([])}; {counter} += {step.at([])}) {{")
    end_line = to.nested(number + 1, inside, lambda names: _carry(to, cells, names))
    to.emit("}")
    for name, cell in zip(op.results, cells, strict=True):
        to.scopes[-1][name] = cell
    return end_line + 1


@lowers("scf.while")
def _while(to: _Lowering, op: Operation, number: int) -> int:
    match = re.match(r"\((.*?)\) : \((.*?)\) -> (.*) \{", op.text)
    assert match, op.text
    carried = [pair.split(" = ") for pair in _parts(match[1])]
    types = [Type.parse(type) for type in _parts(match[2])]
    cells = [_cell(to, type, to.value(first)) for (_, first), type in zip(carried, types, strict=True)]
    passed: list[Value] = []

    def condition(names: list[str]) -> None:
        to.emit(f"if (!({to.value(names[0]).at([])})) break;")
        passed.extend(to.value(name) for name in names[1:])

    to.emit("for (;;) {")
    end = to.nested(number + 1, {name: cell for (name, _), cell in zip(carried, cells, strict=True)}, condition)
    names = re.findall(r"(%[\w$.-]+): ", to.body[end + 1])
    end = to.nested(end + 2, dict(zip(names, passed, strict=True)), lambda names: _carry(to, cells, names))
    to.emit("}")
    for name, value in zip(op.results, passed, strict=True):
        to.scopes[-1][name] = value
    return end + 1


def _cell(to: _Lowering, type: Type, first: Value) -> Value:
    """What a loop carries, with its first value in it."""
    if not type.shape:
        return to.scalar(type, first.at([]), first.base)
    cell = to.held(type, to.array(type), first.base)
    to.each(type, lambda index: f"{cell.at(index)} = {first.at(index)};")
    return cell


def _carry(to: _Lowering, cells: list[Value], names: list[str]) -> None:
    """The cells' next values. All are read before any is written."""
    assignments = []
    for name, cell in zip(names, cells, strict=True):
        value = to.value(name)
        if not cell.type.shape:
            next_ = to.fresh("y")
            to.emit(f"const {cell.type.c} {next_} = {value.at([])};")
            assignments.append(f"{cell.at([])} = {next_};")
            continue
        if value.array == cell.array:
            continue
        if value.array is None or value.array in {one.array for one in cells}:
            value = to.hold(Value(value.type, value.at, value.cheap, None, value.base))
        if value.array in to.owned[-1] and names.count(name) == 1:
            assignments.append(f"std::swap({cell.array}, {value.array});")
        else:
            assignments.append(f"std::memcpy({cell.array}, {value.array}, {cell.type.size} * sizeof *{cell.array});")
    for line in assignments:
        to.emit(line)


@lowers("scf.if")
def _if(to: _Lowering, op: Operation, number: int) -> int:
    match = re.match(r"(%\S+)(?: -> \((.*)\))? \{", op.text)
    assert match, op.text
    condition = to.value(match[1])
    types = [Type.parse(type) for type in _parts(match[2])] if match[2] else []
    cells = [to.held(type, to.array(type)) if type.shape else to.scalar(type, f"{type.c}{{}}") for type in types]

    def give(names: list[str]) -> None:
        for name, cell in zip(names, cells, strict=True):
            value = to.value(name)
            cell.base = value.base
            if cell.type.shape:
                to.each(cell.type, lambda index, cell=cell, value=value: f"{cell.at(index)} = {value.at(index)};")
            else:
                to.emit(f"{cell.at([])} = {value.at([])};")

    to.emit(f"if ({condition.at([])}) {{")
    end = to.nested(number + 1, {}, give)
    to.emit("}")
    if to.body[end].startswith("} else {"):
        to.emit("else {")
        end = to.nested(end + 1, {}, give)
        to.emit("}")
    for name, cell in zip(op.results, cells, strict=True):
        to.scopes[-1][name] = cell
    return end + 1


@lowers("cf.cond_br")
def _branch(to: _Lowering, op: Operation, number: int) -> None:
    match = re.match(r"(%\S+), \^(bb\d+), \^(bb\d+)", op.text)
    if match is None:
        raise Unsupported(f"{to.name}: a branch that passes values has no lowering on the CPU: {op.text}")
    to.emit(f"if ({to.value(match[1]).at([])}) goto {match[2]}; else goto {match[3]};")


@lowers("cf.br")
def _jump(to: _Lowering, op: Operation, number: int) -> None:
    to.emit(f"goto {op.text.lstrip('^')};")


@lowers("tt.return")
def _return(to: _Lowering, op: Operation, number: int) -> None:
    to.emit("goto done;")


def _parts(text: str) -> list[str]:
    """Split at commas that no bracket holds."""
    parts, depth, begin = [], 0, 0
    for place, sign in enumerate(text):
        depth += (sign in "<([{") - (sign in ">)]}")
        if sign == "," and depth == 0:
            parts.append(text[begin:place].strip())
            begin = place + 1
    return [*parts, text[begin:].strip()]
