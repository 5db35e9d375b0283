"""Triton's tile IR as text, read an operation a line, since Triton's bindings show no constants."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
BYTES = {"f64": 8, "i64": 8, "f32": 4, "i32": 4, "bf16": 2, "f16": 2, "i16": 2, "f8E4M3FN": 1, "f8E5M2": 1, "i8": 1, "i1": 1}
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

    @property
    def width(self) -> int:
        """Bytes of an element in a program."""
        return 8 if self.pointer else 4 if self.element in ROUNDED else BYTES[self.element]

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
    base: str = "-1"
    """For pointers, in C++: the number of the tensor they were made from, -1 where that is not known."""
    near: int | None = None
    """For indices and pointers: an axis along which neighbours seem to differ by one. Loops over memory run along it."""


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


def parts(text: str) -> list[str]:
    """Split at commas that no bracket holds."""
    parts, depth, begin = [], 0, 0
    for place, sign in enumerate(text):
        depth += (sign in "<([{") - (sign in ">)]}")
        if sign == "," and depth == 0:
            parts.append(text[begin:place].strip())
            begin = place + 1
    return [*parts, text[begin:].strip()]
