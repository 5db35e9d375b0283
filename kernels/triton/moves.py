"""Keys and values from place to place in their pages, and out of them and in again. A program a position of a layer.

    pages of all layers ── gathered ──▶ KVRows [positions, layers, Hkv, D] ── scattered ──▶ pages

A copy is both, one after the other, so that all is read before any is written. What moves is bits: integers as wide as the values.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
import triton
import triton.language as tl

from headrace.kernels.kv_rows import KVRows, check_copy, check_pages, slots_of
from headrace.kernels.triton.pages import KVPages
from headrace.kernels.triton.tiles import power_of_two

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


@triton.jit
def move_kernel(
    keys,
    values,
    scales,
    row_keys,
    row_values,
    row_scales,
    slots,
    layer_values,
    layer_scales,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    SCALED: tl.constexpr,
    GATHER: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`layer_values` and `layer_scales` are how far layers are apart."""
    position, layer = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + position)
    page, offset = (slot // PAGE).to(tl.int64), slot % PAGE
    head, at = tl.arange(0, HEADS)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (head < KV_HEADS) & (at < DIM)
    row = (position * tl.num_programs(1) + layer) * KV_HEADS + head
    place = layer * layer_values + ((page * KV_HEADS + head) * PAGE + offset) * DIM + at
    if GATHER:
        tl.store(row_keys + row * DIM + at, tl.load(keys + place, mask=inside), mask=inside)
        tl.store(row_values + row * DIM + at, tl.load(values + place, mask=inside), mask=inside)
    else:
        tl.store(keys + place, tl.load(row_keys + row * DIM + at, mask=inside), mask=inside)
        tl.store(values + place, tl.load(row_values + row * DIM + at, mask=inside), mask=inside)
    if SCALED:
        which = tl.arange(0, 2)[None, :]
        place = layer * layer_scales + ((page * KV_HEADS + head) * 2 + which) * PAGE + offset
        inside = head < KV_HEADS
        if GATHER:
            tl.store(row_scales + row * 2 + which, tl.load(scales + place, mask=inside), mask=inside)
        else:
            tl.store(scales + place, tl.load(row_scales + row * 2 + which, mask=inside), mask=inside)


def copy_kv(kv: Sequence[KVPages], from_slots: np.ndarray, to_slots: np.ndarray) -> None:
    """See `Backend.copy_kv`."""
    check_copy(from_slots, to_slots, kv[0].keys.shape[0] * kv[0].page_size)
    if len(from_slots):
        both = torch.from_numpy(np.concatenate((from_slots, to_slots))).to(kv[0].keys.device)
        rows = rows_of(kv, len(from_slots))
        move(kv, both[: len(from_slots)], rows, gather=True)
        move(kv, both[len(from_slots) :], rows, gather=False)


def gather_kv(kv: Sequence[KVPages], pages: np.ndarray) -> KVRows:
    """See `Backend.gather_kv`."""
    check_pages(pages, kv[0].keys.shape[0], written=False)
    slots = torch.from_numpy(slots_of(pages, kv[0].page_size)).to(kv[0].keys.device)
    rows = rows_of(kv, len(slots))
    move(kv, slots, rows, gather=True)
    return rows


def scatter_kv(kv: Sequence[KVPages], pages: np.ndarray, rows: KVRows) -> None:
    """See `Backend.scatter_kv`."""
    count, heads, page_size, dim = kv[0].keys.shape
    check_pages(pages, count, written=True)
    rows.check((len(pages) * page_size, len(kv), heads, dim), kv[0].keys.dtype, kv[0].scales is not None)
    arrays = (None if x is None else x.contiguous() for x in (rows.keys, rows.values, rows.scales))
    move(kv, torch.from_numpy(slots_of(pages, page_size)).to(kv[0].keys.device), KVRows(*arrays), gather=False)


def rows_of(kv: Sequence[KVPages], positions: int) -> KVRows:
    """Room for so many positions of these pages."""
    _, heads, _, dim = kv[0].keys.shape
    shape = (positions, len(kv), heads)
    keys, values = (torch.empty(*shape, dim, dtype=kv[0].keys.dtype, device=kv[0].keys.device) for _ in range(2))
    scales = None if kv[0].scales is None else torch.empty(*shape, 2, device=kv[0].keys.device)
    return KVRows(keys, values, scales)


def move(kv: Sequence[KVPages], slots: torch.Tensor, rows: KVRows, gather: bool) -> None:
    """Positions at `slots` to the rows, or the rows to there. ValueError for pages that `KVPages.layers` did not give."""
    first = kv[0]
    _, heads, page_size, dim = first.keys.shape
    apart = _apart([layer.keys for layer in kv], [layer.values for layer in kv])
    scales_apart = _apart([layer.scales for layer in kv if layer.scales is not None])
    bits = lambda x: x.view(_BITS[x.itemsize])  # noqa: E731
    if len(slots):
        move_kernel[(len(slots), len(kv))](
            bits(first.keys),
            bits(first.values),
            first.scales,
            bits(rows.keys),
            bits(rows.values),
            rows.scales,
            slots,
            apart,
            scales_apart,
            KV_HEADS=heads,
            DIM=dim,
            PAGE=page_size,
            SCALED=first.scales is not None,
            GATHER=gather,
            HEADS=power_of_two(heads),
            BLOCK=power_of_two(dim),
            # Two loads of 16 bytes a thread, where there is as much.
            num_warps=min(8, max(1, power_of_two(heads * dim * first.keys.itemsize) // 1024)),
        )


def _apart(*tensors: list[torch.Tensor]) -> int:
    """How many values lie between the beginnings of two layers: as many between any two."""
    apart = {(later.data_ptr() - earlier.data_ptr()) // earlier.itemsize for each in tensors for earlier, later in pairwise(each)}
    if len(apart) > 1:
        raise ValueError("the layers' pages do not lie at equal distances: give all that one call of new_kv gave, or some that follow")
    return apart.pop() if apart else 0
