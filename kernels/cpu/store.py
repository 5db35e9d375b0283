"""Packed weights in a file: written when a model is loaded for the first time, memory-mapped by every start after that.

    [ panels of a weight ] [ panels of the next ] …   each from a page boundary on
    [ index: JSON, {name: [[part, offset], …]} ]
    [ trailer: where the index begins, its length, magic ]

A restart reads nothing before it is used, and all workers of a machine share the same memory. The file is written by a thread of its own
while the model serves already, and gets its name when it is whole; until then it is `NAME.PID.part`. Where it cannot be written, a line
says so, and the next start packs the weights again.
"""

import contextlib
import json
import logging
import mmap
import os
import struct
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from headrace.kernels.cpu.memory import HUGE, in_huge_pages
from headrace.kernels.cpu.packed import Part

MAGIC = b"headrace packed1"
TRAILER = struct.Struct("<QQ16s")
SUFFIX, UNFINISHED = ".packed", ".part"
ALIGN = mmap.ALLOCATIONGRANULARITY

PIECE = 4 * HUGE
"""Bytes written at once. Linux caches a file in pages as large as the pieces that it was written in, and maps them as they are cached."""

log = logging.getLogger("headrace.kernels")

_Index = dict[str, list[tuple[Part, int]]]


class PackedStore:
    """The packed weights of one model. `path` ends with SUFFIX; its folder is made, and other versions in it are removed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._map: mmap.mmap | None = None
        self._index: _Index = {}
        self._fresh: dict[str, Sequence[tuple[Part, np.ndarray]]] = {}
        """What is to be written."""
        try:
            self._open()
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, AttributeError, struct.error) as error:
            log.warning("%s is not what it should be (%s): the weights are packed anew", path, error)

    def get(self, name: str) -> list[tuple[Part, np.ndarray]] | None:
        """The weight of that name, mapped; None when it is not there."""
        stored = self._index.get(name)
        if self._map is None or stored is None:
            return None
        return [(part, np.frombuffer(self._map, np.uint8, part.nbytes, offset)) for part, offset in stored]

    def add(self, name: str, parts: Sequence[tuple[Part, np.ndarray]]) -> None:
        """Remember a weight, which nobody changes from now on."""
        self._fresh[name] = parts

    def publish(self) -> None:
        """All weights are there: have them written, and give the file its name once it is on the disk."""
        if self._fresh and self._map is None:
            weights, self._fresh = self._fresh, {}
            threading.Thread(target=self._write, args=(weights,), name="packed", daemon=True).start()

    def _write(self, weights: dict[str, Sequence[tuple[Part, np.ndarray]]]) -> None:
        unfinished = self._path.with_suffix(f".{os.getpid()}{UNFINISHED}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._remove_unfinished()
            with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb", buffering=PIECE) as file:
                index = {name: [(part, _append(file, panels)) for part, panels in parts] for name, parts in weights.items()}
                end, text = file.tell(), json.dumps(index).encode()
                file.write(text + TRAILER.pack(end, len(text), MAGIC))
                file.flush()
                os.fdatasync(file.fileno())
            unfinished.replace(self._path)
            for other in self._path.parent.glob(f"*{SUFFIX}"):
                if other != self._path:
                    other.unlink(missing_ok=True)
        except OSError as error:
            log.warning("packed weights cannot be kept in %s (%s): the next start packs them again", self._path, error)
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)

    def _remove_unfinished(self) -> None:
        """Files that processes were writing when they died."""
        for left in self._path.parent.glob(f"*{UNFINISHED}"):
            if not Path("/proc", left.stem.rpartition(".")[2]).exists():
                left.unlink(missing_ok=True)

    def _open(self) -> None:
        with self._path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - TRAILER.size))
            begin, length, magic = TRAILER.unpack(file.read(TRAILER.size))
            if magic != MAGIC or begin + length + TRAILER.size != size:
                raise ValueError("its end is missing")
            file.seek(begin)
            index = {name: [(Part(*part), offset) for part, offset in stored] for name, stored in json.loads(file.read(length)).items()}
            for stored in index.values():
                for part, offset in stored:
                    if offset % ALIGN or not 0 <= offset <= begin - part.nbytes:
                        raise ValueError("its index is damaged")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        in_huge_pages(self._map)
        self._index = index


def _append(file: BinaryIO, panels: np.ndarray) -> int:
    """Write panels from the next page boundary on; where that is. In pieces that fill the file's buffer, so that it is written whole."""
    file.write(bytes(-file.tell() % ALIGN))
    begin = file.tell()
    while len(panels):
        count = PIECE - file.tell() % PIECE
        file.write(panels[:count])
        panels = panels[count:]
    return begin
