"""Rows of a step as the flat arrays that kernels read.

rows   [ A: 3 tokens ][ B: 1 token ][ C: 2 tokens ]
ids      a₅ a₆ a₇       b₉            c₀ c₁
slots    page * page_size + offset for each token, from the sequence's page table
"""

from dataclasses import dataclass

import numpy as np
import torch

from headrace.engine.ledger.ledger import Row
from headrace.kernels.ops import Extents


@dataclass(frozen=True, slots=True)
class Batch:
    ids: torch.Tensor
    """int32 [T]."""
    extents: Extents
    starts: list[int]
    """For each row the place of its first token in the flat arrays."""


def build_batch(rows: list[Row], page_size: int, device: torch.device) -> Batch:
    """The flat arrays of `rows`, on `device`."""
    total = sum(row.length for row in rows)
    ids = np.empty(total, np.int32)
    positions = np.empty(total, np.int32)
    slots = np.empty(total, np.int32)
    context = np.empty(len(rows), np.int32)
    pages = np.zeros((len(rows), max(len(row.sequence.pages) for row in rows)), np.int32)
    starts = []
    at = 0
    for index, row in enumerate(rows):
        sequence, start, length = row.sequence, row.start, row.length
        starts.append(at)
        table = pages[index]
        table[: len(sequence.pages)] = sequence.pages
        context[index] = start + length
        if length == 1:
            ids[at] = sequence.tokens[start]
            positions[at] = start
            slots[at] = sequence.pages[start // page_size] * page_size + start % page_size
        else:
            places = np.arange(start, start + length, dtype=np.int32)
            ids[at : at + length] = sequence.tokens[start : start + length]
            positions[at : at + length] = places
            slots[at : at + length] = table[places // page_size] * page_size + places % page_size
        at += length
    query_start = np.array([*starts, total], np.int32)

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    extents = Extents(tensor(positions), tensor(slots), tensor(query_start), tensor(context), tensor(pages))
    return Batch(tensor(ids), extents, starts)
