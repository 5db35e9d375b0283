"""The paged keys and values of a model, in memory that the system hands out when a page is first written."""

from dataclasses import dataclass

import numpy as np

from headrace.kernels.cpu import _native
from headrace.kernels.cpu.memory import zeros
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
        width, keys = _padded(heads.dim), heads.dim * page_size
        numbers = zeros((pages, layers, heads.kv_heads, keys + page_size * width), TYPES[dtype])
        scales = np.zeros((layers, pages, heads.kv_heads, 2, page_size), np.float32) if dtype == "int8" else None
        return [
            cls(
                numbers[:, layer, :, :keys].reshape(pages, heads.kv_heads, heads.dim, page_size),
                numbers[:, layer, :, keys:].reshape(pages, heads.kv_heads, page_size, width),
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
        """The pages as the kernels know them. ValueError where they were made for other heads, or do not lie as above."""
        pages, page_size, dtype = self.keys.shape[0], self.keys.shape[-1], self.keys.dtype
        types = list(TYPES.values())
        if dtype not in types:
            raise ValueError(f"pages cannot be of {dtype}: choose one of {', '.join(TYPES)}")
        if (dtype == np.int8) != (self.scales is not None):
            raise ValueError(f"pages of {dtype} with{'out' if self.scales is None else ''} scales")
        width, item = _padded(heads.dim), dtype.itemsize
        keys = heads.dim * page_size
        head, apart = (keys + page_size * width) * item, self.keys.strides[0]
        # name, array, dtype, shape, strides in bytes
        arrays = [
            ("keys", self.keys, dtype, (pages, heads.kv_heads, heads.dim, page_size), (apart, head, page_size * item, item)),
            ("values", self.values, dtype, (pages, heads.kv_heads, page_size, width), (apart, head, width * item, item)),
        ]
        if self.scales is not None:
            strides = (heads.kv_heads * page_size * 8, page_size * 8, page_size * 4, 4)
            arrays.append(("scales", self.scales, np.dtype(np.float32), (pages, heads.kv_heads, 2, page_size), strides))
        for name, x, wanted, shape, _ in arrays:
            if x.dtype != wanted or x.shape != shape:
                raise ValueError(f"{name} must be {wanted} {list(shape)}, it is {x.dtype} {list(x.shape)}")
        for name, x, _, shape, strides in arrays:
            # Along an axis of one there is no next to be anywhere.
            if any(size > 1 and found != wanted for size, found, wanted in zip(shape, x.strides, strides, strict=True)):
                raise ValueError(f"{name} must have strides of {list(strides)} bytes, it has {list(x.strides)}")
        if self.values.ctypes.data != self.keys.ctypes.data + keys * item:
            raise ValueError("values must stand behind the keys of their head")
        scales = 0 if self.scales is None else self.scales.ctypes.data
        return _native.KV(self.keys.ctypes.data, scales, pages, apart // item, page_size, types.index(dtype))


def page_bytes(layers: int, page_size: int, heads: HeadShape, dtype: str) -> int:
    """Bytes of one page in all layers together."""
    scales = 2 * np.dtype(np.float32).itemsize if dtype == "int8" else 0
    return layers * heads.kv_heads * page_size * ((heads.dim + _padded(heads.dim)) * TYPES[dtype].itemsize + scales)


def _padded(dim: int) -> int:
    return -(-dim // _LANES) * _LANES
