"""Packed weights in a file: written while a model is loaded for the first time, memory-mapped by every start after that.

    [ panels of a weight ] [ panels of the next ] …   each from a page boundary on
    [ index: JSON, {name: [[part, offset], …]} ]
    [ trailer: where the index begins, its length, magic ]

Weights are packed straight into the mapped file, so nothing is held twice, a restart reads nothing before it is used, and all workers of
a machine share the same memory. The file gets its name when it is whole; until then it is `NAME.PID.part`. Where it cannot be written
the weights stay in memory, and a line says so.
"""

import json
import logging
import mmap
import os
import struct
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from headrace.kernels.cpu.packed import Part, in_memory

MAGIC = b"headrace packed1"
TRAILER = struct.Struct("<QQ16s")
SUFFIX, UNFINISHED = ".packed", ".part"
ALIGN = mmap.ALLOCATIONGRANULARITY

log = logging.getLogger("headrace.kernels")

_Index = dict[str, list[tuple[Part, int]]]


class PackedStore:
    """The packed weights of one model. `path` ends with SUFFIX; its folder is made, and other versions in it are removed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._map: mmap.mmap | None = None
        self._index: _Index = {}
        self._file: int | None = None
        self._end = 0
        self._fresh: list[int] = []
        """Where memory was allocated that no name has yet."""
        try:
            self._open()
        except FileNotFoundError:
            self._create()
        except (OSError, ValueError, TypeError, AttributeError, struct.error) as error:
            log.warning("%s is not what it should be (%s): the weights are packed anew", path, error)
            self._create()

    def get(self, name: str) -> list[tuple[Part, np.ndarray]] | None:
        """The weight of that name, mapped; None when it is not there."""
        stored = self._index.get(name)
        if self._map is None or stored is None:
            return None
        return [(part, np.frombuffer(self._map, np.uint8, part.nbytes, offset)) for part, offset in stored]

    def allocate(self, nbytes: int) -> np.ndarray:
        """Memory for panels: in the file while there is room for it, else from the heap."""
        if self._file is not None:
            begin = -(-self._end // ALIGN) * ALIGN
            try:
                # Blocks are claimed now: a full disk must be an error here and not a signal at the first write.
                os.posix_fallocate(self._file, begin, nbytes)
                room = np.frombuffer(mmap.mmap(self._file, nbytes, offset=begin), np.uint8)
            except OSError as error:
                self._give_up(error)
            else:
                self._fresh.append(begin)
                self._end = begin + nbytes
                return room
        return in_memory(nbytes)

    def add(self, name: str, parts: Sequence[tuple[Part, np.ndarray]]) -> None:
        """Remember a weight, whose parts lie where memory was allocated since the last."""
        if self._file is None:
            return
        self._index[name] = [(part, offset) for (part, _), offset in zip(parts, self._fresh, strict=True)]
        self._fresh.clear()

    def publish(self) -> None:
        """All weights are there: give the file its name, once it is on the disk. The wait for the disk is another thread's."""
        if self._file is not None:
            file, self._file = self._file, None
            threading.Thread(target=self._finish, args=(file,), name="packed", daemon=True).start()

    def _finish(self, file: int) -> None:
        try:
            index = json.dumps(self._index).encode()
            os.pwrite(file, index + TRAILER.pack(self._end, len(index), MAGIC), self._end)
            os.fdatasync(file)
            self._unfinished.replace(self._path)
            for other in self._path.parent.glob(f"*{SUFFIX}"):
                if other != self._path:
                    other.unlink(missing_ok=True)
        except OSError as error:
            log.warning("the packed weights cannot be kept in %s (%s): the next start packs them again", self._path, error)
        finally:
            os.close(file)

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
        self._index = index

    def _create(self) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            for left in self._path.parent.glob(f"*{UNFINISHED}"):
                if not Path(f"/proc/{left.suffixes[-2][1:]}").exists():
                    left.unlink(missing_ok=True)
            self._unfinished = self._path.with_suffix(f".{os.getpid()}{UNFINISHED}")
            self._file = os.open(self._unfinished, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        except (OSError, IndexError) as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        log.warning("packed weights cannot be kept in %s (%s): every start packs them again", self._path, error)
        self._index.clear()
        if self._file is not None:
            os.close(self._file)
            self._file = None
            self._unfinished.unlink(missing_ok=True)
