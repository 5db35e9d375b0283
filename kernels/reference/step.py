"""The tokens of a step and the pages of a layer, as tensors."""

from dataclasses import dataclass

import numpy as np
import torch

from headrace.kernels import weights
from headrace.kernels.ops import Batch, HeadShape

TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""What pages can be stored in, by the name the settings give it."""

LARGEST = {torch.int8: weights.LARGEST["int8"], torch.float8_e4m3fn: weights.LARGEST["e4m3"]}
"""The types that need a scale for each head of each position, and the code of its largest magnitude."""


@dataclass(frozen=True, slots=True)
class StepTokens:
    """`headrace.kernels.ops.Batch` on a device."""

    ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    query_start: torch.Tensor
    pages: torch.Tensor
    parents: torch.Tensor | None = None

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> "StepTokens":
        arrays = (batch.ids, batch.positions, batch.slots, batch.query_start, batch.pages, batch.parents)
        return cls(*(None if array is None else torch.from_numpy(array).to(device) for array in arrays))


@dataclass(frozen=True, slots=True)
class KVPages:
    """The paged keys and values of one layer: [pages, Hkv, page_size, D] each, of one of TYPES. For those in LARGEST alone, scales
    float32 [pages, Hkv, 2, page_size]: of keys, then of values."""

    keys: torch.Tensor
    values: torch.Tensor
    scales: torch.Tensor | None = None

    @classmethod
    def new(cls, pages: int, page_size: int, heads: HeadShape, device: torch.device, dtype: torch.dtype) -> "KVPages":
        """Filled with zeros. A CPU's memory is handed out when a page is first written, so that unused room costs nothing."""

        def room(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            if device.type == "cpu":
                return torch.from_numpy(np.zeros((*shape[:-1], shape[-1] * dtype.itemsize), np.uint8)).view(dtype)
            return torch.zeros(shape, dtype=dtype, device=device)

        shape = (pages, heads.kv_heads, page_size, heads.dim)
        scales = room((pages, heads.kv_heads, 2, page_size), torch.float32) if dtype in LARGEST else None
        return cls(room(shape, dtype), room(shape, dtype), scales)

    def write(self, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        """Put float32 k and v [T, Hkv, D] to their slots [T]."""
        page_size = self.keys.shape[2]
        pages, offsets = slots.long() // page_size, slots.long() % page_size
        for which, (room, x) in enumerate(((self.keys, keys), (self.values, values))):
            if self.scales is not None:
                largest = x.abs().amax(-1)
                # What is not finite makes a scale of NaN.
                finite = largest.isfinite()
                most = LARGEST[room.dtype]
                inverse = torch.where(finite & (largest >= weights.SMALLEST), most / largest, 0.0)
                self.scales[pages, :, which, offsets] = torch.where(finite, largest / most, torch.nan)
                x = torch.where(finite[..., None], x, 0.0).mul(inverse[..., None])
                x = x.round() if room.dtype == torch.int8 else x
            # Not every type can be written to by index: its bytes can.
            room.view(torch.uint8).view(*room.shape, -1)[pages, :, offsets] = x.to(room.dtype).view(torch.uint8).view(*x.shape, -1)

    def read(self, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of pages `numbers`, in order, as float32 [Hkv, positions, D]."""
        rooms = []
        for which, room in enumerate((self.keys, self.values)):
            rows = room.view(torch.uint8).index_select(0, numbers).view(room.dtype).float()
            if self.scales is not None:
                rows *= self.scales[:, :, which].index_select(0, numbers)[..., None]
            rooms.append(rows.transpose(0, 1).flatten(1, 2))
        return rooms[0], rooms[1]
