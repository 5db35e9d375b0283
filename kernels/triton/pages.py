"""The paged keys and values of a layer on a device, and the type in which attention multiplies them."""

from dataclasses import dataclass

import torch

from headrace.kernels.ops import HeadShape
from headrace.kernels.triton.weights import knows_float8

TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""What pages can be stored in, by the name the settings give it."""
SCALED = ("int8", "fp8")
"""Those that need a scale for each head of each position."""


@dataclass(frozen=True, slots=True)
class KVPages:
    """[pages, Hkv, page_size, D] each, of one of TYPES; fp8 in uint8 where a card knows no such type. For SCALED alone, scales float32
    [pages, Hkv, 2, page_size]: of keys, then of values."""

    keys: torch.Tensor
    values: torch.Tensor
    scales: torch.Tensor | None

    @classmethod
    def new(cls, pages: int, page_size: int, heads: HeadShape, device: torch.device, dtype: str) -> "KVPages":
        """Filled with zeros."""
        return cls.layers(1, pages, page_size, heads, device, dtype)[0]

    @classmethod
    def layers(cls, layers: int, pages: int, page_size: int, heads: HeadShape, device: torch.device, dtype: str) -> list["KVPages"]:
        """The same for each of so many layers, at equal distances in memory: one launch reaches them all."""
        shape = (layers, pages, heads.kv_heads, page_size, heads.dim)
        stored = torch.uint8 if dtype == "fp8" and not knows_float8(device) else TYPES[dtype]
        keys, values = (torch.zeros(shape, dtype=stored, device=device) for _ in range(2))
        if dtype not in SCALED:
            return [cls(keys[layer], values[layer], None) for layer in range(layers)]
        scales = torch.zeros(layers, pages, heads.kv_heads, 2, page_size, device=device)
        return [cls(keys[layer], values[layer], scales[layer]) for layer in range(layers)]

    @property
    def page_size(self) -> int:
        return self.keys.shape[2]

    @property
    def multiplied_as(self) -> torch.dtype:
        """The type of queries and weights beside these: float16 holds every int8 and float8."""
        return torch.float16 if self.scales is not None else self.keys.dtype


def page_bytes(layers: int, page_size: int, heads: HeadShape, dtype: str) -> int:
    position = 2 * (TYPES[dtype].itemsize * heads.dim + (4 if dtype in SCALED else 0))
    return layers * heads.kv_heads * page_size * position
