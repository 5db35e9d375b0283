"""The GGUF container: a header, typed metadata, a directory of tensors, and their bytes, mapped and never copied.

    magic · version · counts │ metadata: key, type, value … │ directory: name, shape, type, offset … │ pad │ tensor bytes

Opening checks the whole file once: every length against what is left of the file, every tensor against its end and against
its neighbours. Nothing is allocated from a number that the file merely claims. Long arrays (the vocabulary, the merges) are
measured at open and decoded when asked for. Layout: the GGUF specification of the ggml project, versions 2 and 3.

Knows no tensor arithmetic: `workers.quant.ggml` unpacks blocks.
"""

import math
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.engine.checkpoint.wording import shown
from headrace.engine.errors import UserError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4
MAX_NESTING = 4
MAX_KEY_BYTES = 65_535
MAX_STRINGS = 1 << 24
"""Elements of one array that must be walked one by one; the largest vocabularies have a fiftieth of it."""

GGML_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}
"""ggml's number of a tensor type: its name, weights a block, bytes a block."""

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_SCALARS: dict[int, str] = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One entry of the directory."""

    name: str
    shape: tuple[int, ...]
    """Slowest dimension first: (N, K) for a matrix of N rows, the reverse of the order in the file."""
    type: str
    """A name in GGML_TYPES."""
    offset: int
    """Bytes from the start of the file."""
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Array:
    """An array of the metadata that is measured but not decoded: its elements lie in bytes `start` … `end - 1`."""

    element: int
    count: int
    start: int
    end: int


class Metadata(Mapping[str, Any]):
    """The metadata, read like a dict. Arrays come as lists, decoded at first use and kept."""

    def __init__(self, data: mmap.mmap, values: dict[str, Any]) -> None:
        self._data = data
        self._values = values

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        if isinstance(value, _Array):
            value = self._values[key] = _decode(self._data[value.start : value.end], 0, value.element, value.count)[0]
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def length(self, key: str) -> int:
        """Elements of an array, without decoding it; KeyError when there is no such array."""
        value = self._values[key]
        if not isinstance(value, _Array | list):
            raise KeyError(key)
        return value.count if isinstance(value, _Array) else len(value)


class GGUFFile:
    """An open GGUF file: `metadata`, `tensors` by name in file order, and their bytes.

    Raises UserError, in one line that names the file and the fault, for whatever is wrong with it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._data = _map(self.path)
        cursor = _Cursor(self._data, self.path)
        self.version = _read_version(cursor)
        tensor_count, value_count = cursor.u64("the number of tensors"), cursor.u64("the number of metadata entries")
        values: dict[str, Any] = {}
        for _ in range(value_count):
            key = cursor.name("a metadata key")
            if key in values:
                raise cursor.fault(f"it has the metadata key {shown(key)} twice")
            values[key] = cursor.value(key)
        self.metadata = Metadata(self._data, values)
        self.alignment = _read_alignment(values, cursor)
        entries = [_read_entry(cursor) for _ in _counted(tensor_count, cursor)]
        start = -(-cursor.position // self.alignment) * self.alignment
        self.tensors = _place(entries, start, self.alignment, cursor)

    def tensor_bytes(self, name: str) -> memoryview:
        """The tensor's bytes as they lie in the file: a view that keeps the mapping alive. KeyError for an unknown name."""
        info = self.tensors[name]
        return memoryview(self._data)[info.offset : info.offset + info.nbytes]


def _map(path: Path) -> mmap.mmap:
    """Map a whole file privately.

    The mapping is writable because torch warns about memory that is not, but nothing writes to it: its pages stay those of
    the page cache, shared by all processes. Swap is not reserved for it, so a file may be larger than memory.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 24:
                raise UserError(f"{path} is not a GGUF file: it has only {size} bytes")
            flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
            return mmap.mmap(file.fileno(), size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


class _Cursor:
    """A position in the file that never leaves it."""

    __slots__ = ("data", "end", "path", "position")

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data = data
        self.path = path
        self.position = 0
        self.end = len(data)

    def fault(self, what: str) -> UserError:
        return UserError(f"{self.path} is a damaged GGUF file: {what}")

    def skip(self, count: int, what: str) -> int:
        """Move over `count` bytes and return where they start."""
        start = self.position
        if count > self.end - start:
            raise self.fault(f"it ends within {what} (at byte {start} of {self.end}, which wants {count} more)")
        self.position = start + count
        return start

    def u32(self, what: str) -> int:
        return _U32.unpack_from(self.data, self.skip(4, what))[0]

    def u64(self, what: str) -> int:
        return _U64.unpack_from(self.data, self.skip(8, what))[0]

    def string(self, what: str) -> bytes:
        length = self.u64(what)
        start = self.skip(length, what)
        return self.data[start : start + length]

    def name(self, what: str) -> str:
        """A key or a tensor's name: short, and UTF-8."""
        length = self.u64(what)
        if length > MAX_KEY_BYTES:
            raise self.fault(f"{what} at byte {self.position} claims {length} bytes")
        start = self.skip(length, what)
        try:
            return str(self.data[start : start + length], "utf-8")
        except UnicodeDecodeError:
            raise self.fault(f"{what} at byte {start} is not UTF-8") from None

    def value(self, key: str) -> Any:
        """A metadata value; arrays are checked and left where they lie."""
        what = f"the metadata value {shown(key)}"
        kind = self.u32(what)
        if kind == _STRING:
            # Text is decoded leniently: some published files hold a stray byte in a description.
            return str(self.string(what), "utf-8", "replace")
        if kind == _ARRAY:
            return self.array(what, 1)
        code = _SCALARS.get(kind)
        if code is None:
            raise self.fault(f"{what} has the unknown type {kind}")
        return struct.unpack_from("<" + code, self.data, self.skip(struct.calcsize(code), what))[0]

    def array(self, what: str, depth: int) -> _Array:
        element, count = self.u32(what), self.u64(what)
        start = self.position
        if element in _SCALARS:
            self.skip(count * struct.calcsize(_SCALARS[element]), what)
            return _Array(element, count, start, self.position)
        if element not in (_STRING, _ARRAY):
            raise self.fault(f"{what} is an array of the unknown type {element}")
        if count > MAX_STRINGS or count * 8 > self.end - start:
            raise self.fault(f"{what} claims {count} elements")
        if element == _STRING:
            self.position = self._after_strings(start, count, what)
        elif depth >= MAX_NESTING:
            raise self.fault(f"{what} nests arrays more than {MAX_NESTING} deep")
        else:
            for _ in range(count):
                self.array(what, depth + 1)
        return _Array(element, count, start, self.position)

    def _after_strings(self, position: int, count: int, what: str) -> int:
        """Where an array of strings ends: half of what it takes to open a file, hence the plain loop."""
        read, data, last = _U64.unpack_from, self.data, self.end - 8
        for _ in range(count):
            if position > last:
                raise self.fault(f"it ends within {what}")
            position += 8 + read(data, position)[0]
        if position > self.end:
            raise self.fault(f"it ends within {what}")
        return position


def _decode(data: bytes, position: int, element: int, count: int) -> tuple[list[Any], int]:
    """The array of `count` elements at `position` as a list, and the position behind it. Lengths were checked at open."""
    if element in _SCALARS:
        form = f"<{count}{_SCALARS[element]}"
        return list(struct.unpack_from(form, data, position)), position + struct.calcsize(form)
    values: list[Any] = []
    if element == _STRING:
        read = _U64.unpack_from
        for _ in range(count):
            start = position + 8
            position = start + read(data, position)[0]
            values.append(data[start:position])
        try:
            return [value.decode() for value in values], position
        except UnicodeDecodeError:
            return [value.decode(errors="replace") for value in values], position
    for _ in range(count):
        kind, length = _U32.unpack_from(data, position)[0], _U64.unpack_from(data, position + 4)[0]
        inner, position = _decode(data, position + 12, kind, length)
        values.append(inner)
    return values, position


def _read_version(cursor: _Cursor) -> int:
    magic = bytes(cursor.data[:4])
    if magic != MAGIC:
        raise UserError(f"{cursor.path} is not a GGUF file: it starts with {magic!r}, not {MAGIC!r}")
    cursor.position = 4
    version = cursor.u32("the version")
    if version in VERSIONS:
        return version
    if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
        raise UserError(f"{cursor.path} is a big-endian GGUF file: only little-endian files can be read")
    raise UserError(f"{cursor.path} is a GGUF file of version {version}: versions 2 and 3 can be read")


def _read_alignment(values: dict[str, Any], cursor: _Cursor) -> int:
    alignment = values.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
        raise cursor.fault(f"general.alignment is {shown(alignment)}, not a power of two of at least 8")
    return alignment


def _counted(count: int, cursor: _Cursor) -> range:
    """A claimed number of tensors; each needs at least 32 bytes of directory."""
    if count > (cursor.end - cursor.position) // 32:
        raise cursor.fault(f"it claims {count} tensors, more than its directory can hold")
    return range(count)


def _read_entry(cursor: _Cursor) -> TensorInfo:
    """One entry of the directory; its offset still counts from the start of the tensor bytes."""
    name = cursor.name("a tensor's name")
    what = f"the entry of tensor {shown(name)}"
    dimensions = cursor.u32(what)
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise cursor.fault(f"tensor {shown(name)} has {dimensions} dimensions: 1 to {MAX_DIMENSIONS} are possible")
    shape = tuple(cursor.u64(what) for _ in range(dimensions))[::-1]
    kind, offset = cursor.u32(what), cursor.u64(what)
    if kind not in GGML_TYPES:
        raise UserError(f"{cursor.path}: tensor {shown(name)} has the type number {kind}, which is not a known GGUF tensor type")
    type_name, block, size = GGML_TYPES[kind]
    if 0 in shape or shape[-1] % block:
        raise cursor.fault(f"tensor {shown(name)} has the shape {list(shape)}: its rows must be multiples of {block} for {type_name}")
    return TensorInfo(name, shape, type_name, offset, math.prod(shape) // block * size)


def _place(entries: list[TensorInfo], start: int, alignment: int, cursor: _Cursor) -> dict[str, TensorInfo]:
    """Turn offsets into places in the file, and check that every tensor lies within it and on its own."""
    placed: dict[str, TensorInfo] = {}
    for entry in entries:
        name = shown(entry.name)
        if entry.name in placed:
            raise cursor.fault(f"it has tensor {name} twice")
        if entry.offset % alignment:
            raise cursor.fault(f"tensor {name} starts at offset {entry.offset}, not a multiple of the alignment {alignment}")
        info = TensorInfo(entry.name, entry.shape, entry.type, start + entry.offset, entry.nbytes)
        if info.offset + info.nbytes > cursor.end:
            raise cursor.fault(
                f"tensor {name} should end at byte {info.offset + info.nbytes}, but the file has {cursor.end}: "
                "an unfinished download? Get it again"
            )
        placed[info.name] = info
    end, before = 0, ""
    for info in sorted(placed.values(), key=lambda info: info.offset):
        if info.offset < end:
            raise cursor.fault(f"tensors {shown(before)} and {shown(info.name)} overlap")
        end, before = info.offset + info.nbytes, info.name
    return placed
