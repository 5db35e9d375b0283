"""The tokens of a step on a device, and how their rows are cut into tiles of attention.

rows of request 0 [ t0 t1 t2 ][ t3 t4 ]   request 1 [ t5 ]        a tile is some tokens of one request with all query heads of a KV head
rows of a tree    [ t6 ][ t7 ][ t8 ]                              a tile a token, with the path from the root that leads to it
"""

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch

from headrace.kernels.ops import Batch
from headrace.kernels.triton.tiles import KV_SPLIT, QUERY_ROWS


@dataclass(frozen=True, slots=True)
class Tiles:
    """For one number of query heads a KV head."""

    table: torch.Tensor
    """int32 [tiles, 3]: the request, its first token in the tile, and the one behind its last."""

    @property
    def count(self) -> int:
        return self.table.shape[0]


@dataclass(frozen=True, slots=True)
class StepTokens:
    """`headrace.kernels.ops.Batch` on a device, with what attention's launches must know of it. int32 throughout."""

    ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    query_start: torch.Tensor
    pages: torch.Tensor
    splits: int
    """Splits of the longest context."""
    extents: tuple[int, ...]
    """`query_start` on the host."""
    paths: torch.Tensor | None = None
    """[T, depth]: the rows of its request that a row of a tree follows and itself, from the root down. None where nothing is a tree."""
    single: Tiles | None = None
    """Where every request has one token: a tile each, whatever the heads."""
    known_tiles: dict[int, Tiles] = field(default_factory=dict)

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> "StepTokens":
        """All arrays in one copy."""
        arrays = [batch.ids, batch.positions, batch.slots, batch.query_start, batch.pages]
        if batch.parents is not None:
            arrays.append(paths(batch.query_start, batch.parents))
        flat = torch.from_numpy(np.concatenate([array.reshape(-1) for array in arrays])).to(device)
        parts = [part.view(array.shape) for part, array in zip(flat.split([array.size for array in arrays]), arrays, strict=True)]
        splits = int(batch.positions.max()) // KV_SPLIT + 1 if len(batch.ids) else 0
        return cls(*parts[:5], splits, tuple(batch.query_start.tolist()), parts[5] if len(parts) > 5 else None)

    def tiles(self, group: int) -> Tiles:
        """The tiles for `group` query heads a KV head."""
        if self.single is not None:
            return self.single
        if group not in self.known_tiles:
            most = 1 if self.paths is not None else max(1, QUERY_ROWS // group)
            table = [
                (request, first, min(first + most, end))
                for request, (begin, end) in enumerate(pairwise(self.extents))
                for first in range(begin, end, most)
            ]
            self.known_tiles[group] = Tiles(torch.tensor(table, dtype=torch.int32).view(-1, 3).to(self.ids.device))
        return self.known_tiles[group]


def paths(query_start: np.ndarray, parents: np.ndarray) -> np.ndarray:
    """`StepTokens.paths` of a batch whose rows form trees."""
    found: list[list[int]] = []
    for begin, end in pairwise(query_start.tolist()):
        for row, parent in enumerate(parents[begin:end].tolist()):
            found.append([*(found[begin + parent] if parent >= 0 else ()), row])
    table = np.zeros((len(found), max(map(len, found), default=1)), np.int32)
    for row, path in enumerate(found):
        table[row, : len(path)] = path
    return table
