"""Keys and values that were taken out of their pages, in one form for all backends, and what is checked before any are moved.

    pages of each layer, laid out as a backend wants ──▶ KVRows [positions, layers, Hkv, D] ──▶ other pages, perhaps another process's

Used by every backend for `copy_kv`, `gather_kv` and `scatter_kv`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class KVRows:
    """K and V of some positions in all layers, each array contiguous: a position's stand together. Arrays of the backend's own kind, on its
    device, of the type that the pages are of."""

    keys: Any
    """[positions, layers, Hkv, D]."""
    values: Any
    """[positions, layers, Hkv, D]."""
    scales: Any | None
    """Where pages have any, float32 [positions, layers, Hkv, 2]: of keys, then of values."""

    def check(self, keys: tuple[int, ...], dtype: Any, scaled: bool) -> None:
        """ValueError unless keys and values are of this shape and type, and scales are there just where they should be, of theirs."""
        wanted = [("keys", self.keys, keys), ("values", self.values, keys)]
        if scaled != (self.scales is not None):
            raise ValueError(f"rows with{'out' if scaled else ''} scales, for pages with{'' if scaled else 'out'}")
        if self.scales is not None:
            wanted.append(("scales", self.scales, (*keys[:-1], 2)))
        for name, x, shape in wanted:
            if tuple(x.shape) != shape or (name != "scales" and x.dtype != dtype):
                of = "" if name == "scales" else f" of {dtype}"
                raise ValueError(f"{name} {list(x.shape)} of {x.dtype}: these pages take {list(shape)}{of}")


def check_copy(from_slots: np.ndarray, to_slots: np.ndarray, slots: int) -> None:
    """ValueError unless so many places of `slots` go to as many others, each of which is named once."""
    if from_slots.shape != to_slots.shape:
        raise ValueError(f"from_slots {list(from_slots.shape)} and to_slots {list(to_slots.shape)} must be of one shape")
    _check("from_slots", from_slots, slots)
    _check("to_slots", to_slots, slots)
    _check_distinct("to_slots", to_slots)


def check_pages(pages: np.ndarray, count: int, written: bool) -> None:
    """ValueError unless these are pages of `count`, and none is named twice if they are to be written."""
    _check("pages", pages, count)
    if written:
        _check_distinct("pages", pages)


def slots_of(pages: np.ndarray, page_size: int) -> np.ndarray:
    """The slots of whole pages, in their order: int32."""
    return (pages[:, None] * np.int32(page_size) + np.arange(page_size, dtype=np.int32)).reshape(-1)


def _check(name: str, x: np.ndarray, limit: int) -> None:
    if x.ndim != 1 or x.dtype != np.int32:
        raise ValueError(f"{name} must be int32 of one dimension, it is {x.dtype} {list(x.shape)}")
    if x.size and not (x.min() >= 0 and x.max() < limit):
        raise ValueError(f"{name} from {x.min()} to {x.max()}: they must be from 0 to {limit - 1}")


def _check_distinct(name: str, x: np.ndarray) -> None:
    ordered = np.sort(x)
    if (twice := ordered[1:][ordered[1:] == ordered[:-1]]).size:
        raise ValueError(f"{name} name {twice[0]} more than once: what would stand there is not defined")
