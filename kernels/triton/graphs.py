"""Steps that only decode, captured once as a CUDA graph for each size and replayed: what there is of CUDA beside the kernels.

A graph is made for so many rows and so many splits of context, both rounded up to a power of two. Rows that are not there have no slot
and no tile; they are computed and forgotten. What a graph reads stands at one place, which a step fills by a single copy.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from headrace.kernels.ops import Batch
from headrace.kernels.triton.step import StepTokens, Tiles
from headrace.kernels.triton.tiles import KV_SPLIT, power_of_two

MOST_ROWS = 256
"""Rows beyond which a step's launches no longer cost what they compute."""

NO_SLOT = -1
"""Where keys and values of a row go that is not there."""

Whole = Callable[[StepTokens], tuple[tuple[torch.Tensor, ...], torch.Tensor]]
"""Tokens to the states that `Model.forward` gives, and logits [T, V]."""


@dataclass(frozen=True, slots=True)
class Captured:
    graph: torch.cuda.CUDAGraph
    staged: torch.Tensor
    """int32 in pinned memory: ids, positions, slots, tiles, pages."""
    inputs: torch.Tensor
    """The same on the device."""
    states: tuple[torch.Tensor, ...]
    logits: torch.Tensor
    copied: torch.cuda.Event
    """When the device has read `staged`: before that nothing may be written there."""


class Graphs:
    """The graphs of one program."""

    def __init__(self, whole: Whole, device: torch.device, page_size: int) -> None:
        self._whole = whole
        self._device = device
        self._page_size = page_size
        self._captured: dict[tuple[int, int], Captured] = {}
        self._pool = torch.cuda.graph_pool_handle()

    @staticmethod
    def fits(batch: Batch) -> bool:
        """Whether the step is one token each of not too many requests."""
        return batch.parents is None and 0 < len(batch.ids) == len(batch.pages) <= MOST_ROWS

    def replay(self, batch: Batch) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """States and logits of the rows, which stay until the next call."""
        rows, splits = len(batch.ids), int(batch.positions.max()) // KV_SPLIT + 1
        size, reach = power_of_two(rows), power_of_two(splits)
        if (size, reach) not in self._captured:
            self._captured[size, reach] = self._capture(size, reach)
        captured = self._captured[size, reach]
        captured.copied.synchronize()
        staged = captured.staged.numpy()
        staged[: 6 * size] = 0
        ids, positions, slots = staged[: 3 * size].reshape(3, size)
        slots[:] = NO_SLOT
        ids[:rows], positions[:rows], slots[:rows] = batch.ids, batch.positions, batch.slots
        tiles = staged[3 * size : 6 * size].reshape(size, 3)
        tiles[:rows] = np.arange(rows)[:, None] + (0, 0, 1)
        table = staged[6 * size :].reshape(size, -1)
        width = min(table.shape[1], batch.pages.shape[1])
        table[:rows, :width] = batch.pages[:, :width]
        captured.inputs.copy_(captured.staged, non_blocking=True)
        captured.copied.record()
        captured.graph.replay()
        return tuple(state[:rows] for state in captured.states), captured.logits[:rows]

    def _capture(self, size: int, splits: int) -> Captured:
        width = -(-splits * KV_SPLIT // self._page_size)
        staged = pinned(size * (6 + width))
        staged[2 * size : 3 * size] = NO_SLOT
        inputs = staged.to(self._device)
        ids, positions, slots = inputs[: 3 * size].view(3, size)
        tiles = Tiles(inputs[3 * size : 6 * size].view(size, 3))
        # Extents are for trees: no row is looked up by its request's here.
        tokens = StepTokens(ids, positions, slots, ids, inputs[6 * size :].view(size, width), splits, (), None, tiles)
        side = torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            # Kernels are compiled, and memory is found, before anything is captured.
            self._whole(tokens)
        torch.cuda.current_stream(self._device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            states, logits = self._whole(tokens)
        return Captured(graph, staged, inputs, states, logits, torch.cuda.Event())


def pinned(size: int) -> torch.Tensor:
    """int32 zeros that a device copies while the host goes on."""
    return torch.zeros(size, dtype=torch.int32, pin_memory=True)
