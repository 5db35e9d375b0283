"""The paged keys and values of a layer on a device, and the type in which attention multiplies them."""

from dataclasses import dataclass

import torch

from headrace.kernels.ops import HeadShape

TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}
"""What pages can be stored in, by the name the settings give it."""


@dataclass(frozen=True, slots=True)
class KVPages:
    """[pages, Hkv, page_size, D] each, of one of TYPES. For int8 alone, scales float32 [pages, Hkv, 2, page_size]: of keys, then of
    values."""

    keys: torch.Tensor
    values: torch.Tensor
    scales: torch.Tensor | None

    @classmethod
    def new(cls, pages: int, page_size: int, heads: HeadShape, device: torch.device, dtype: str) -> "KVPages":
        """Filled with zeros."""
        shape = (pages, heads.kv_heads, page_size, heads.dim)
        keys, values = (torch.zeros(shape, dtype=TYPES[dtype], device=device) for _ in range(2))
        scales = torch.zeros(pages, heads.kv_heads, 2, page_size, device=device) if dtype == "int8" else None
        return cls(keys, values, scales)

    @property
    def page_size(self) -> int:
        return self.keys.shape[2]

    @property
    def multiplied_as(self) -> torch.dtype:
        """The type of queries and weights beside these: float16 holds every int8."""
        return torch.float16 if self.scales is not None else self.keys.dtype


def page_bytes(layers: int, page_size: int, heads: HeadShape, dtype: str) -> int:
    position = 2 * (TYPES[dtype].itemsize * heads.dim + (4 if dtype == "int8" else 0))
    return layers * heads.kv_heads * page_size * position
