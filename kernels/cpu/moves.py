"""Keys and values from place to place in their pages, and out of them and in again: numpy reads and writes what the kernels do."""

from collections.abc import Sequence

import numpy as np

from headrace.kernels.cpu.pages import Pages
from headrace.kernels.kv_rows import KVRows, check_copy, check_pages, slots_of


def copy_kv(kv: Sequence[Pages], from_slots: np.ndarray, to_slots: np.ndarray) -> None:
    """See `Backend.copy_kv`."""
    pages, _, _, page_size = kv[0].keys.shape
    check_copy(from_slots, to_slots, pages * page_size)
    # Widths that kernels pad values to need not move along: they are zeros everywhere.
    _write(kv, to_slots, _read(kv, from_slots))


def gather_kv(kv: Sequence[Pages], pages: np.ndarray) -> KVRows:
    """See `Backend.gather_kv`."""
    check_pages(pages, kv[0].keys.shape[0], written=False)
    return _read(kv, slots_of(pages, kv[0].keys.shape[-1]))


def scatter_kv(kv: Sequence[Pages], pages: np.ndarray, rows: KVRows) -> None:
    """See `Backend.scatter_kv`."""
    count, heads, dim, page_size = kv[0].keys.shape
    check_pages(pages, count, written=True)
    rows.check((len(pages) * page_size, len(kv), heads, dim), kv[0].keys.dtype, kv[0].scales is not None)
    _write(kv, slots_of(pages, page_size), rows)


def _read(kv: Sequence[Pages], slots: np.ndarray) -> KVRows:
    _, heads, dim, page_size = kv[0].keys.shape
    page, offset = np.divmod(slots, page_size)
    shape = (len(slots), len(kv), heads)
    keys, values = (np.empty((*shape, dim), kv[0].keys.dtype) for _ in range(2))
    scales = None if kv[0].scales is None else np.empty((*shape, 2), np.float32)
    for number, layer in enumerate(kv):
        keys[:, number] = layer.keys[page, :, :, offset]
        values[:, number] = layer.values[page, :, offset, :dim]
        if scales is not None and layer.scales is not None:
            scales[:, number] = layer.scales[page, :, :, offset]
    return KVRows(keys, values, scales)


def _write(kv: Sequence[Pages], slots: np.ndarray, rows: KVRows) -> None:
    _, _, dim, page_size = kv[0].keys.shape
    page, offset = np.divmod(slots, page_size)
    for number, layer in enumerate(kv):
        layer.keys[page, :, :, offset] = rows.keys[:, number]
        layer.values[page, :, offset, :dim] = rows.values[:, number]
        if layer.scales is not None and rows.scales is not None:
            layer.scales[page, :, :, offset] = rows.scales[:, number]
