"""What a compiled kernel loads from global memory, by the tensor that it loads from: read from the LLVM IR that Triton makes of it.

    function (%0, %1, …) ◀─ getelementptr, phi, select … ◀─ the pointer of a load ─▶ its width

Loads of NVIDIA's GPUs stand there as assembly, those of AMD's as calls. Neither is made narrower or wider afterwards.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

WIDE = 16
"""Bytes that a thread loads at most by one instruction; the tensor memory accelerator loads no less."""

_ARGUMENTS = re.compile(r"^define [^@]*@\w+\((.*)\)[^()]*\{$", re.MULTILINE)
_DEFINED = re.compile(r"^  (%[\w.]+) = (.*)$", re.MULTILINE)
_POINTER = re.compile(r"ptr(?: addrspace\(\d+\))?(?: \w+)* (%[\w.]+)")
_JOINED = re.compile(r"\[ (%[\w.]+), %")
_ASSEMBLY = re.compile(r"ld\.global[\w.:]*?(?:\.v(\d))?\.b(\d+) ")
_COPY = re.compile(r"cp\.async\.c[ag]\.shared\.global[^;]*?, 0x([0-9a-f]+)")
_CALL = re.compile(r"= (?:tail )?call (\S+|<\d+ x \w+>) @llvm\.amdgcn\.raw\.ptr\.buffer\.load")
_PLAIN = re.compile(r"= load (?:volatile )?(<\d+ x \w+>|\w+), ptr addrspace\(1\) ")
_TYPE = re.compile(r"(?:<(\d+) x )?(i\d+|half|bfloat|float|double)")
_BITS = {"half": 16, "bfloat": 16, "float": 32, "double": 64}


@dataclass(frozen=True, slots=True)
class Load:
    """Of one tensor."""

    bytes: int
    """The tensor's."""
    wide: float
    """Share of what is loaded from it, as it stands in the code, that comes by loads of WIDE bytes."""


def loads_of(llvm_ir: str, names: Sequence[str], arguments: dict[str, Any]) -> dict[str, Load]:
    """By argument, what is loaded from; `names` are those of the function's, which gets no constants, `arguments` the tensors."""
    found = {}
    for place, sizes in widths(llvm_ir).items():
        # Behind them Triton passes scratch memory of its own.
        if place < len(names):
            tensor, every = arguments[names[place]], sum(size * count for size, count in sizes.items())
            wide = sum(size * count for size, count in sizes.items() if size >= WIDE)
            found[names[place]] = Load(tensor.numel() * tensor.itemsize, wide / every)
    return found


def widths(llvm_ir: str) -> dict[int, Counter[int]]:
    """For each argument of the function that is loaded from, by its place: bytes of a load, and how often such a one stands there."""
    arguments = _ARGUMENTS.search(llvm_ir)
    assert arguments is not None, "Triton makes one function of a kernel"
    places = {name: place for place, name in enumerate(re.findall(r"%[\w.]+", arguments[1]))}
    made_of = {name: {*_POINTER.findall(text), *(_JOINED.findall(text) if text.startswith("phi ptr") else ())}
               for name, text in _DEFINED.findall(llvm_ir)}  # fmt: skip
    found: dict[int, Counter[int]] = {}
    for pointers, size in _each(llvm_ir):
        for place in {places[root] for root in _roots(pointers, made_of) if root in places}:
            found.setdefault(place, Counter())[size] += 1
    return found


def _each(llvm_ir: str) -> Iterator[tuple[list[str], int]]:
    """The pointers that each load names, and its bytes."""
    for line in llvm_ir.splitlines():
        if "cp.async.bulk" in line:
            yield _POINTER.findall(line), WIDE
        elif match := _COPY.search(line):
            yield _POINTER.findall(line), int(match[1], 16)
        elif match := _ASSEMBLY.search(line):
            yield _POINTER.findall(line), int(match[1] or 1) * int(match[2]) // 8
        elif match := _CALL.search(line) or _PLAIN.search(line):
            yield _POINTER.findall(line), _bytes(match[1])


def _bytes(kind: str) -> int:
    match = _TYPE.match(kind)
    assert match is not None, f"{kind} is no type of a load"
    return int(match[1] or 1) * (_BITS.get(match[2]) or int(match[2][1:])) // 8


def _roots(names: list[str], made_of: dict[str, set[str]]) -> set[str]:
    """What these pointers are made of in the end."""
    waiting, seen = list(names), set()
    while waiting:
        if (name := waiting.pop()) not in seen:
            seen.add(name)
            waiting += made_of.get(name, ())
    return seen
