"""Rows of a step as the flat arrays that kernels read.

rows   [ A: 3 tokens ][ B: 1 token ][ C: 2 tokens ]
ids      a₅ a₆ a₇       b₉            c₀ c₁
slots    page * page_size + offset for each token, from the sequence's page table
"""

import numpy as np

from headrace.engine.ledger.ledger import Row
from headrace.kernels.ops import Batch


def build_batch(rows: list[Row], page_size: int) -> tuple[Batch, list[int]]:
    """The flat arrays of `rows`, and for each row the place of its first token in them."""
    total = sum(row.length for row in rows)
    ids = np.empty(total, np.int32)
    positions = np.empty(total, np.int32)
    slots = np.empty(total, np.int32)
    pages = np.zeros((len(rows), max(len(row.sequence.pages) for row in rows)), np.int32)
    starts = []
    at = 0
    for index, row in enumerate(rows):
        sequence, start, length = row.sequence, row.start, row.length
        starts.append(at)
        table = pages[index]
        table[: len(sequence.pages)] = sequence.pages
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
    return Batch(ids, positions, slots, np.array([*starts, total], np.int32), pages), starts
