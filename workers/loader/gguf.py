"""Weights out of a GGUF file: floats as views of the mapped file, blocks unpacked into `GroupedInt` when asked for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from headrace.engine.checkpoint.gguf import GGUFFile, TensorInfo
from headrace.engine.errors import UserError
from headrace.kernels.weights import Dense, Weight, widened
from headrace.workers.quant import ggml

FLOATS = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
"""How each is held: see `headrace.kernels.weights.Dense`."""


class GGUFCheckpoint:
    """See `headrace.workers.loader.checkpoint.Checkpoint`. `metadata` is the GGUF metadata; its arrays are decoded at first use."""

    format = "gguf"

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file = GGUFFile(path)
        self.metadata: Mapping[str, Any] = self._file.metadata

    def names(self) -> list[str]:
        return list(self._file.tensors)

    @property
    def files(self) -> set[Path]:
        return {self.path}

    def __contains__(self, name: str) -> bool:
        return name in self._file.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self._info(name).shape

    def weight(self, name: str, rows: slice | None = None, columns: slice | None = None) -> Weight:
        info = self._info(name)
        if len(info.shape) != 2:
            raise UserError(f"{self.path}: tensor {name!r} has the shape {list(info.shape)} where a matrix is expected")
        data = self._file.tensor_bytes(name)
        if dtype := FLOATS.get(info.type):
            values = np.frombuffer(data, dtype).reshape(info.shape)
            return Dense(values[rows or slice(None), columns or slice(None)])
        self._check_type(info)
        packed = np.frombuffer(data, np.uint8).reshape(info.shape[0], -1)
        try:
            return ggml.unpack(info.type, packed[rows or slice(None)], columns)
        except ValueError as error:
            raise UserError(f"{self.path}: tensor {name!r} cannot be cut there: {error}") from None

    def experts(self, name: str) -> list[Weight]:
        info = self._info(name)
        if len(info.shape) != 3:
            raise UserError(f"{self.path}: tensor {name!r} has the shape {list(info.shape)} where a matrix an expert is expected")
        data = self._file.tensor_bytes(name)
        if dtype := FLOATS.get(info.type):
            return [Dense(values) for values in np.frombuffer(data, dtype).reshape(info.shape)]
        self._check_type(info)
        return [ggml.unpack(info.type, packed) for packed in np.frombuffer(data, np.uint8).reshape(*info.shape[:2], -1)]

    def vector(self, name: str, rows: slice | None = None) -> np.ndarray:
        info = self._info(name)
        if len(info.shape) != 1:
            raise UserError(f"{self.path}: tensor {name!r} has the shape {list(info.shape)} where a vector is expected")
        data = self._file.tensor_bytes(name)
        if dtype := FLOATS.get(info.type):
            values = widened(np.frombuffer(data, dtype))
        else:
            self._check_type(info)
            values = ggml.unpack(info.type, np.frombuffer(data, np.uint8).reshape(1, -1)).dequantize().ravel()
        return values[rows or slice(None)]

    def _info(self, name: str) -> TensorInfo:
        if (info := self._file.tensors.get(name)) is None:
            raise UserError(f"{self.path} has no tensor {name!r}: the file does not fit its architecture")
        return info

    def _check_type(self, info: TensorInfo) -> None:
        if info.type not in ggml.FORMATS:
            raise UserError(
                f"{self.path}: tensor {info.name!r} has the type {info.type}: {', '.join([*FLOATS, *ggml.FORMATS])} can be read"
            )
