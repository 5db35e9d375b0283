"""Weights out of a Hugging Face directory: each tensor a view of its mapped safetensors file, no bytes copied."""

import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from headrace.engine.checkpoint.hf import StoredTensor, read_config, read_tensors
from headrace.engine.errors import UserError
from headrace.kernels.weights import Dense, Weight, widened

FLOATS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(np.uint16)}
"""How each is held: see `headrace.kernels.weights.Dense`."""


class SafetensorsCheckpoint:
    """See `headrace.workers.loader.checkpoint.Checkpoint`. `metadata` is config.json (of a multimodal model, its text part)."""

    format = "huggingface"

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metadata: Mapping[str, Any] = read_config(self.path)
        self._tensors = read_tensors(self.path)
        self._maps: dict[Path, mmap.mmap] = {}

    def names(self) -> list[str]:
        return list(self._tensors)

    @property
    def files(self) -> set[Path]:
        return {stored.file for stored in self._tensors.values()}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored(name).shape

    def weight(self, name: str, rows: slice | None = None, columns: slice | None = None) -> Weight:
        values = self._view(name)
        if values.ndim != 2:
            raise UserError(f"{self.path}: tensor {name!r} has the shape {list(values.shape)} where a matrix is expected")
        return Dense(values[rows or slice(None), columns or slice(None)])

    def experts(self, name: str) -> list[Weight]:
        values = self._view(name)
        if values.ndim != 3:
            raise UserError(f"{self.path}: tensor {name!r} has the shape {list(values.shape)} where a matrix an expert is expected")
        return [Dense(matrix) for matrix in values]

    def vector(self, name: str, rows: slice | None = None) -> np.ndarray:
        values = self._view(name)
        if values.ndim != 1:
            raise UserError(f"{self.path}: tensor {name!r} has the shape {list(values.shape)} where a vector is expected")
        return widened(values[rows or slice(None)])

    def _stored(self, name: str) -> StoredTensor:
        if (stored := self._tensors.get(name)) is None:
            raise UserError(f"{self.path} has no tensor {name!r}: the files do not fit the architecture in config.json")
        return stored

    def _view(self, name: str) -> np.ndarray:
        stored = self._stored(name)
        dtype = FLOATS.get(stored.dtype)
        if dtype is None:
            raise UserError(f"{stored.file}: tensor {name!r} has the type {stored.dtype}: {', '.join(FLOATS)} can be read")
        data = memoryview(self._mapped(stored.file))[stored.offset : stored.offset + stored.nbytes]
        if stored.offset % dtype.itemsize:
            data = bytearray(data)  # The format asks for no alignment, kernels do.
        return np.frombuffer(data, dtype).reshape(stored.shape)

    def _mapped(self, file: Path) -> mmap.mmap:
        """One mapping a file, private and never written to (see `headrace.engine.checkpoint.gguf`)."""
        if file not in self._maps:
            with file.open("rb") as opened:
                flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
                self._maps[file] = mmap.mmap(opened.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        return self._maps[file]
