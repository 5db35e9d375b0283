"""The paged keys and values of one layer, in memory that the system hands out when a page is first written."""

from dataclasses import dataclass

import numpy as np

from headrace.kernels.cpu import _native
from headrace.kernels.ops import HeadShape

_LANES = 8

TYPES = {"f32": np.dtype(np.float32), "f16": np.dtype(np.float16), "int8": np.dtype(np.int8)}
"""What pages can be stored in, by the name the settings give it, in the order of `KVForm` in src/ops.h."""


@dataclass(frozen=True, slots=True)
class Pages:
    """keys [pages, Hkv, D, page_size], transposed so that a vector holds positions; values [pages, Hkv, page_size, D padded to a multiple
    of 8]. Both of one of TYPES. For int8 alone, scales float32 [pages, Hkv, 2, page_size]: of keys, then of values."""

    keys: np.ndarray
    values: np.ndarray
    scales: np.ndarray | None = None

    @classmethod
    def new(cls, pages: int, page_size: int, heads: HeadShape, dtype: str = "f32") -> "Pages":
        """Filled with zeros. ValueError for a page size that is no multiple of 8."""
        if page_size % _LANES:
            raise ValueError(f"pages of {page_size} tokens have no native kernel: use a multiple of {_LANES}")
        keys = np.zeros((pages, heads.kv_heads, heads.dim, page_size), TYPES[dtype])
        values = np.zeros((pages, heads.kv_heads, page_size, _padded(heads.dim)), TYPES[dtype])
        scales = np.zeros((pages, heads.kv_heads, 2, page_size), np.float32) if dtype == "int8" else None
        return cls(keys, values, scales)

    @property
    def position_bytes(self) -> int:
        """Bytes of one position in this layer."""
        scales = 0 if self.scales is None else self.scales.nbytes
        return (self.keys.nbytes + self.values.nbytes + scales) // (self.keys.shape[0] * self.keys.shape[-1])

    def checked(self, heads: HeadShape) -> _native.KV:
        """The pages as the kernels know them. ValueError where they were made for other heads."""
        pages, page_size, dtype = self.keys.shape[0], self.keys.shape[-1], self.keys.dtype
        types = list(TYPES.values())
        if dtype not in types:
            raise ValueError(f"pages cannot be of {dtype}: choose one of {', '.join(TYPES)}")
        arrays = [
            ("keys", self.keys, dtype, (pages, heads.kv_heads, heads.dim, page_size)),
            ("values", self.values, dtype, (pages, heads.kv_heads, page_size, _padded(heads.dim))),
        ]
        if (dtype == np.int8) != (self.scales is not None):
            raise ValueError(f"pages of {dtype} with{'out' if self.scales is None else ''} scales")
        if self.scales is not None:
            arrays.append(("scales", self.scales, np.dtype(np.float32), (pages, heads.kv_heads, 2, page_size)))
        for name, x, wanted, shape in arrays:
            if x.dtype != wanted or x.shape != shape or not x.flags.c_contiguous:
                raise ValueError(f"{name} must be contiguous {wanted} {list(shape)}, it is {x.dtype} {list(x.shape)}")
        scales = 0 if self.scales is None else self.scales.ctypes.data
        return _native.KV(self.keys.ctypes.data, self.values.ctypes.data, scales, pages, page_size, types.index(dtype))


def page_bytes(layers: int, page_size: int, heads: HeadShape, dtype: str) -> int:
    """Bytes of one page in all layers together."""
    scales = 2 * np.dtype(np.float32).itemsize if dtype == "int8" else 0
    return layers * heads.kv_heads * page_size * ((heads.dim + _padded(heads.dim)) * TYPES[dtype].itemsize + scales)


def _padded(dim: int) -> int:
    return -(-dim // _LANES) * _LANES
