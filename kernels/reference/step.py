"""The tokens of a step and the pages of a layer, as tensors."""

from dataclasses import dataclass

import numpy as np
import torch

from headrace.kernels.ops import Batch, HeadShape

TYPES = {"f32": torch.float32, "f16": torch.float16}
"""What pages can be stored in, by the name the settings give it."""


@dataclass(frozen=True, slots=True)
class StepTokens:
    """`headrace.kernels.ops.Batch` on a device."""

    ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    query_start: torch.Tensor
    pages: torch.Tensor

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> "StepTokens":
        arrays = (batch.ids, batch.positions, batch.slots, batch.query_start, batch.pages)
        return cls(*(torch.from_numpy(array).to(device) for array in arrays))


@dataclass(frozen=True, slots=True)
class KVPages:
    """The paged keys and values of one layer: [pages, Hkv, page_size, D] each, of one of TYPES."""

    keys: torch.Tensor
    values: torch.Tensor

    @classmethod
    def new(cls, pages: int, page_size: int, heads: HeadShape, device: torch.device, dtype: torch.dtype) -> "KVPages":
        """Filled with zeros. A CPU's memory is handed out when a page is first written, so that unused room costs nothing."""
        shape = (pages, heads.kv_heads, page_size, heads.dim)

        def room() -> torch.Tensor:
            if device.type == "cpu":
                return torch.from_numpy(np.zeros(shape, np.float16 if dtype == torch.float16 else np.float32))
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(room(), room())
