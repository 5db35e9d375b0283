"""The paged keys and values of one layer, in memory that the system hands out when a page is first written."""

from dataclasses import dataclass

import numpy as np

from headrace.kernels.cpu import _native
from headrace.kernels.ops import HeadShape

_LANES = 8

TYPES = {"f32": np.dtype(np.float32), "f16": np.dtype(np.float16)}
"""What pages can be stored in, by the name the settings give it."""


@dataclass(frozen=True, slots=True)
class Pages:
    """keys [pages, Hkv, D, page_size], transposed so that a vector holds positions; values [pages, Hkv, page_size, D padded to a multiple
    of 8]. Both of one of TYPES."""

    keys: np.ndarray
    values: np.ndarray

    @classmethod
    def new(cls, pages: int, page_size: int, heads: HeadShape, dtype: str = "f32") -> "Pages":
        """Filled with zeros. ValueError for a page size that is no multiple of 8."""
        if page_size % _LANES:
            raise ValueError(f"pages of {page_size} tokens have no native kernel: use a multiple of {_LANES}")
        keys = np.zeros((pages, heads.kv_heads, heads.dim, page_size), TYPES[dtype])
        return cls(keys, np.zeros((pages, heads.kv_heads, page_size, _padded(heads.dim)), TYPES[dtype]))

    @property
    def position_bytes(self) -> int:
        """Bytes of one position in this layer."""
        return (self.keys.nbytes + self.values.nbytes) // (self.keys.shape[0] * self.keys.shape[-1])

    def checked(self, heads: HeadShape) -> _native.KV:
        """The pages as the kernels know them. ValueError where they were made for other heads."""
        pages, page_size = self.keys.shape[0], self.keys.shape[-1]
        for name, x, shape in (
            ("keys", self.keys, (pages, heads.kv_heads, heads.dim, page_size)),
            ("values", self.values, (pages, heads.kv_heads, page_size, _padded(heads.dim))),
        ):
            if x.dtype not in TYPES.values() or x.dtype != self.keys.dtype or x.shape != shape or not x.flags.c_contiguous:
                raise ValueError(f"{name} must be contiguous {self.keys.dtype} {list(shape)}, it is {x.dtype} {list(x.shape)}")
        halves = self.keys.dtype == np.float16
        return _native.KV(self.keys.ctypes.data, self.values.ctypes.data, pages, page_size, halves)


def page_bytes(layers: int, page_size: int, heads: HeadShape, dtype: str) -> int:
    """Bytes of one page in all layers together."""
    return layers * heads.kv_heads * page_size * (heads.dim + _padded(heads.dim)) * TYPES[dtype].itemsize


def _padded(dim: int) -> int:
    return -(-dim // _LANES) * _LANES
