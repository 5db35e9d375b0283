"""The paged keys and values of one layer, in memory that the system hands out when a page is first written."""

from dataclasses import dataclass

import numpy as np

from headrace.kernels.cpu import _native
from headrace.kernels.ops import HeadShape


@dataclass(frozen=True, slots=True)
class Pages:
    """keys and values, float32 [pages, Hkv, page_size, D] each."""

    keys: np.ndarray
    values: np.ndarray

    @classmethod
    def new(cls, pages: int, page_size: int, heads: HeadShape) -> "Pages":
        shape = (pages, heads.kv_heads, page_size, heads.dim)
        return cls(np.zeros(shape, np.float32), np.zeros(shape, np.float32))

    def checked(self, heads: HeadShape) -> _native.KV:
        """The pages as the kernels know them. ValueError where they were made for other heads."""
        for name, x in (("keys", self.keys), ("values", self.values)):
            fits = (
                x.ndim == 4 and x.shape[1] == heads.kv_heads and x.shape[2] > 0 and x.shape[3] == heads.dim and x.shape == self.keys.shape
            )
            if x.dtype != np.float32 or not fits or not x.flags.c_contiguous:
                wanted = f"[pages, {heads.kv_heads}, page_size, {heads.dim}]"
                raise ValueError(f"{name} must be contiguous float32 {wanted}, it is {x.dtype} {list(x.shape)}")
        return _native.KV(self.keys.ctypes.data, self.values.ctypes.data, self.keys.shape[0], self.keys.shape[2])
