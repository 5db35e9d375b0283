"""The paged keys and values of a model, in memory that the system hands out when a page is first written."""

from dataclasses import dataclass

import numpy as np

from headrace.kernels.cpu import _native
from headrace.kernels.cpu.memory import LINE
from headrace.kernels.ops import HeadShape

_LANES = 8

TYPES = {"f32": np.dtype(np.float32), "f16": np.dtype(np.float16), "int8": np.dtype(np.int8)}
"""What pages can be stored in, by the name the settings give it, in the order of `KVForm` in src/ops.h."""


@dataclass(frozen=True, slots=True)
class Pages:
    """One layer's keys [pages, Hkv, D, page_size], transposed so that a vector holds positions; values [pages, Hkv, page_size, D padded to
    a multiple of 8]. Both are views of one of TYPES: a page's numbers stand together, head by head, keys before values, and behind them
    those of the same page in the next layer. For int8 alone, scales float32 [pages, Hkv, 2, page_size]: of keys, then of values."""

    keys: np.ndarray
    values: np.ndarray
    scales: np.ndarray | None

    @classmethod
    def new(cls, layers: int, pages: int, page_size: int, heads: HeadShape, dtype: str = "f32") -> "list[Pages]":
        """Those of every layer, filled with zeros. ValueError for a page size that is no multiple of 8."""
        if page_size % _LANES:
            raise ValueError(f"pages of {page_size} tokens have no native kernel: use a multiple of {_LANES}")
        keys, values = (heads.dim, page_size), (page_size, _padded(heads.dim))
        numbers = _zeros((pages, layers, heads.kv_heads, keys[0] * keys[1] + values[0] * values[1]), TYPES[dtype])
        scales = np.zeros((layers, pages, heads.kv_heads, 2, page_size), np.float32) if dtype == "int8" else None
        shape = (pages, heads.kv_heads)
        return [
            cls(
                numbers[:, layer, :, : keys[0] * keys[1]].reshape(*shape, *keys),
                numbers[:, layer, :, keys[0] * keys[1] :].reshape(*shape, *values),
                None if scales is None else scales[layer],
            )
            for layer in range(layers)
        ]

    @property
    def position_bytes(self) -> int:
        """Bytes of one position in this layer."""
        scales = 0 if self.scales is None else self.scales.nbytes
        return (self.keys.nbytes + self.values.nbytes + scales) // (self.keys.shape[0] * self.keys.shape[-1])

    def checked(self, heads: HeadShape) -> _native.KV:
        """The pages as the kernels know them. ValueError where they were made for other heads."""
        pages, kv_heads, dim, page_size = self.keys.shape
        if (kv_heads, dim) != (heads.kv_heads, heads.dim):
            raise ValueError(f"pages were made for {kv_heads} KV heads of {dim}, not for {heads.kv_heads} of {heads.dim}")
        form = list(TYPES.values()).index(self.keys.dtype)
        apart = self.keys.strides[0] // self.keys.itemsize
        scales = 0 if self.scales is None else self.scales.ctypes.data
        return _native.KV(self.keys.ctypes.data, scales, pages, apart, page_size, form)


def page_bytes(layers: int, page_size: int, heads: HeadShape, dtype: str) -> int:
    """Bytes of one page in all layers together."""
    scales = 2 * np.dtype(np.float32).itemsize if dtype == "int8" else 0
    return layers * heads.kv_heads * page_size * ((heads.dim + _padded(heads.dim)) * TYPES[dtype].itemsize + scales)


def _padded(dim: int) -> int:
    return -(-dim // _LANES) * _LANES


def _zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """From a cache line's boundary on."""
    nbytes = int(np.prod(shape)) * dtype.itemsize
    room = np.zeros(nbytes + LINE, np.uint8)
    start = -room.ctypes.data % LINE
    return room[start : start + nbytes].view(dtype).reshape(shape)
