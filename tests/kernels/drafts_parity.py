"""The checks of `triton_parity.py` for drafts: paths, and moves of keys and values, which are to be the reference's to the bit."""

from collections.abc import Callable, Iterator
from random import Random

import numpy as np
import torch

from headrace.kernels.drafts import NO_TOKEN, walk
from headrace.kernels.kv_rows import KVRows
from headrace.kernels.ops import HeadShape
from headrace.kernels.reference import ReferenceBackend
from headrace.kernels.reference.rejection import rejection_sample
from headrace.kernels.triton import TritonBackend
from headrace.kernels.triton.pages import TYPES
from tests.kernels.trees import rejection_case, trees_of

SIZES = ([7, 0, 1, 30], [0], [1] * 5, [6, 0] * 8)
"""Rows of the requests of a step."""
LAYERS, PAGES, PAGE = 3, 9, 16


def checks(backend: TritonBackend) -> Iterator[tuple[str, Callable[[], float], float]]:
    """Name, what counts the differences, and that there may be none."""
    yield "verify", lambda: paths(backend), 0
    for shape in ("flat", "peaked", "ties", "infinite"):
        yield f"rejection_sample {shape}", lambda shape=shape: rejected(backend, shape), 0
    for heads in (HeadShape(6, 2, 24), HeadShape(8, 8, 128)):
        for kind in TYPES:
            yield f"copy_kv {heads} {kind}", lambda a=(heads, kind): copied(backend, *a), 0
            yield f"gather_kv scatter_kv {heads} {kind}", lambda a=(heads, kind): handed_over(backend, *a), 0


def paths(backend: TritonBackend) -> float:
    """Steps of which anything is not as on the host."""
    dice, wrong = Random(1), 0
    for sizes in (*SIZES, [300, 2]):
        trees = trees_of(dice, sizes, 4)
        tokens = [dice.choice((NO_TOKEN, 0, 1, 2, 3, 3, 3)) for _ in trees.parents]
        wrong += backend.verify(trees, torch.tensor(tokens, dtype=torch.int64, device=backend.device)) != walk(trees, tokens)
    return wrong


def rejected(backend: TritonBackend, shape: str) -> float:
    """Requests that get other rows or tokens."""
    dice, wrong = Random(2), 0
    for vocabulary in (700, 9000):
        for sizes in SIZES:
            logits, batch, trees, probabilities = rejection_case(dice, shape, sizes, vocabulary)
            got = backend.rejection_sample(logits.to(backend.device), batch, trees, probabilities.to(backend.device))
            expected = rejection_sample(logits, batch, trees, probabilities)
            wrong += sum(a != b for a, b in zip(got.rows, expected.rows, strict=True))
            wrong += sum(a != b for a, b in zip(got.tokens, expected.tokens, strict=True))
    return wrong


class Both:
    """The same bits in pages of a backend and of the reference."""

    def __init__(self, backend: TritonBackend, heads: HeadShape, kind: str) -> None:
        self.backend, self.reference = backend, ReferenceBackend()
        self.kv = backend.new_kv(LAYERS, PAGES, PAGE, heads, kind)
        self.expected = self.reference.new_kv(LAYERS, PAGES, PAGE, heads, kind)
        dice = torch.Generator().manual_seed(1)
        for layer, other in zip(self.kv, self.expected, strict=True):
            for name in ("keys", "values", "scales"):
                if (to := getattr(other, name)) is not None:
                    to.view(torch.uint8).copy_(torch.randint(0, 256, to.view(torch.uint8).shape, generator=dice, dtype=torch.uint8))
                    getattr(layer, name).view(torch.uint8).copy_(to.view(torch.uint8))

    def wrong(self) -> float:
        """Bytes of all pages that differ."""
        pairs = [
            (getattr(layer, name), getattr(other, name))
            for layer, other in zip(self.kv, self.expected, strict=True)
            for name in ("keys", "values", "scales")
        ]
        return different([(a, b) for a, b in pairs if a is not None])


def different(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    return sum(int((a.cpu().view(torch.uint8) != b.view(torch.uint8)).sum()) for a, b in pairs)


def copied(backend: TritonBackend, heads: HeadShape, kind: str) -> float:
    both, dice = Both(backend, heads, kind), np.random.default_rng(1)
    slots = PAGES * PAGE
    compacted = np.array([15, 17, 18, 30, 47, 48], np.int32), np.arange(14, 20, dtype=np.int32)
    shuffled = dice.permutation(slots)[:70].astype(np.int32), dice.permutation(slots)[:70].astype(np.int32)
    none = np.empty(0, np.int32)
    for from_slots, to_slots in (compacted, shuffled, (none, none)):
        both.backend.copy_kv(both.kv, from_slots, to_slots)
        both.reference.copy_kv(both.expected, from_slots, to_slots)
    return both.wrong()


def handed_over(backend: TritonBackend, heads: HeadShape, kind: str) -> float:
    """What is gathered, and what stands in all pages when it was put into others."""
    both = Both(backend, heads, kind)
    wrong = 0
    for pages, into in (([5, 2, 0], [2, 8, 3]), ([], [])):
        from_, to = np.array(pages, np.int32), np.array(into, np.int32)
        got, expected = both.backend.gather_kv(both.kv, from_), both.reference.gather_kv(both.expected, from_)
        wrong += different([(a, b) for a, b in zip(arrays_of(got), arrays_of(expected), strict=True) if a is not None])
        both.backend.scatter_kv(both.kv, to, got)
        both.reference.scatter_kv(both.expected, to, expected)
    return wrong + both.wrong()


def arrays_of(rows: KVRows) -> list:
    return [rows.keys, rows.values, rows.scales]
