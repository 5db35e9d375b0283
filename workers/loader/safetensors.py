"""Weights out of a Hugging Face directory: floats as views of their mapped safetensors files, no bytes copied; quantized layers, which
several tensors hold, as the formats in `headrace.workers.quant` read them."""

import mmap
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from headrace.engine.checkpoint.hf import StoredTensor, read_config, read_tensors
from headrace.engine.checkpoint.quantization import Scheme, read_quantization
from headrace.engine.errors import UserError
from headrace.kernels.weights import Dense, Weight, widened
from headrace.workers.quant import awq, gptq, packed, scaled
from headrace.workers.quant.layer import Layer

FLOATS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(np.uint16)}
"""How each is held: see `headrace.kernels.weights.Dense`."""
INTEGERS = {"I8": np.dtype(np.int8), "U8": np.dtype(np.uint8), "I32": np.dtype(np.int32), "I64": np.dtype(np.int64)}
TYPES = {**FLOATS, **INTEGERS, "F8_E4M3": np.dtype(np.uint8)}
"""The types that quantized layers are stored in."""
LAYOUTS: Mapping[str, ModuleType] = {"scaled": scaled, "packed": packed, "gptq": gptq, "awq": awq}
CODES = frozenset(layout.CODES for layout in LAYOUTS.values())
"""What tensors of codes are called."""


class SafetensorsCheckpoint:
    """See `headrace.workers.loader.checkpoint.Checkpoint`. `metadata` is config.json (of a multimodal model, its text part). A quantized
    layer is known as its weight, whatever its tensors are called."""

    format = "huggingface"

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metadata: Mapping[str, Any] = read_config(self.path)
        self._tensors = read_tensors(self.path)
        self._maps: dict[Path, mmap.mmap] = {}
        self._quantized = self._find_quantized()

    def names(self) -> list[str]:
        codes = {f"{layer.name}.{LAYOUTS[scheme.layout].CODES}": name for name, (layer, scheme) in self._quantized.items()}
        layers = {layer.name for layer, _ in self._quantized.values()}
        beside = {name for name in self._tensors if name.rpartition(".")[0] in layers and not name.endswith(".bias")}
        return [codes.get(name, name) for name in self._tensors if name in codes or name not in beside]

    @property
    def files(self) -> set[Path]:
        meaning = {self.path / "config.json"} if self._quantized else set()
        return meaning | {stored.file for stored in self._tensors.values()}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors or name in self._quantized

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self._quantized:
            layer, scheme = self._quantized[name]
            return LAYOUTS[scheme.layout].shape(layer, scheme)
        return self._stored(name).shape

    def weight(self, name: str, rows: slice | None = None, columns: slice | None = None) -> Weight:
        if name in self._quantized:
            layer, scheme = self._quantized[name]
            return LAYOUTS[scheme.layout].read(layer, scheme, rows, columns)
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

    def _find_quantized(self) -> dict[str, tuple[Layer, Scheme]]:
        """The quantized layers by the names of their weights: those whose codes are there."""
        quantization = read_quantization(self.path / "config.json", self.metadata)
        if quantization is None:
            return {}
        found = {}
        for name, stored in self._tensors.items():
            layer, _, part = name.rpartition(".")
            if part not in CODES or (part == "weight" and stored.dtype in FLOATS):
                continue
            scheme = quantization.scheme(layer)
            if scheme is None or part != LAYOUTS[scheme.layout].CODES:
                raise UserError(
                    f"{stored.file}: tensor {name!r} of {stored.dtype} is not what config.json says of its layer "
                    f"(quantization_config, {quantization.method}): get the checkpoint anew"
                )
            found[f"{layer}.weight"] = Layer(layer, self.path, self._tensors, self._mapped_view), scheme
        return found

    def _stored(self, name: str) -> StoredTensor:
        if (stored := self._tensors.get(name)) is None:
            raise UserError(f"{self.path} has no tensor {name!r}: the files do not fit the architecture in config.json")
        return stored

    def _view(self, name: str) -> np.ndarray:
        stored = self._stored(name)
        if stored.dtype not in FLOATS:
            raise UserError(f"{stored.file}: tensor {name!r} has the type {stored.dtype}: {', '.join(FLOATS)} can be read")
        return self._mapped_view(stored)

    def _mapped_view(self, stored: StoredTensor) -> np.ndarray:
        dtype = TYPES[stored.dtype]
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
