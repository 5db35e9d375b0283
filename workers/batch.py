"""Rows of a step as the flat arrays that kernels read.

rows   [ A: 3 tokens ][ B: 1 token ][ C: 2 tokens ]
ids      a₅ a₆ a₇       b₉            c₀ c₁
slots    page * page_size + offset for each token, from the sequence's page table

All of them are views of one array, made from one list: between two steps what costs is how much code is touched, for the step before
has driven it from the caches.
"""

from dataclasses import dataclass
from itertools import repeat

import numpy as np

from headrace.engine.ledger.ledger import Row
from headrace.kernels.ops import Batch


@dataclass(frozen=True, slots=True)
class Flat:
    batch: Batch
    starts: list[int]
    """For each row, the place of its first token in the batch."""
    picks: np.ndarray
    """int32: the places of the last token of each row that emits, and of its drafts."""


def build_batch(rows: list[Row], page_size: int, drafts: list[list[int]] | None = None) -> Flat:
    """The flat arrays of `rows`, each with its drafts behind it if there are any."""
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    starts = [0]
    picks: list[int] = []
    tables: list[int] = []
    width = max([len(row.sequence.pages) for row in rows])
    for row, draft in zip(rows, drafts or repeat(()), strict=False):
        sequence, start = row.sequence, row.start
        pages = sequence.pages
        if row.length == 1 and not draft:
            ids.append(sequence.tokens[start])
            positions.append(start)
            slots.append(pages[start // page_size] * page_size + start % page_size)
        else:
            places = range(start, start + row.length + len(draft))
            ids += sequence.tokens[start : start + row.length]
            ids += draft
            positions += places
            slots += [pages[place // page_size] * page_size + place % page_size for place in places]
        starts.append(len(ids))
        if row.emits:
            picks += range(len(ids) - 1 - len(draft), len(ids))
        tables += pages
        if len(pages) < width:
            tables += [0] * (width - len(pages))
    flat = np.array(ids + positions + slots + starts + picks + tables, np.int32)
    count, a = len(ids), 3 * len(ids)
    b = a + len(starts)
    c = b + len(picks)
    batch = Batch(flat[:count], flat[count : 2 * count], flat[2 * count : a], flat[a:b], flat[c:].reshape(len(rows), width))
    starts.pop()
    return Flat(batch, starts, flat[b:c])
