"""Keys and values from place to place in their pages, and out of them and in again, byte for byte."""

from collections.abc import Sequence

import numpy as np
import torch

from headrace.kernels.kv_rows import KVRows, check_copy, check_pages, slots_of
from headrace.kernels.reference.step import KVPages


def copy_kv(kv: Sequence[KVPages], from_slots: np.ndarray, to_slots: np.ndarray) -> None:
    """See `Backend.copy_kv`."""
    pages, _, page_size, _ = kv[0].keys.shape
    check_copy(from_slots, to_slots, pages * page_size)
    _write(kv, to_slots, _read(kv, from_slots))


def gather_kv(kv: Sequence[KVPages], pages: np.ndarray) -> KVRows:
    """See `Backend.gather_kv`."""
    check_pages(pages, kv[0].keys.shape[0], written=False)
    return _read(kv, slots_of(pages, kv[0].keys.shape[2]))


def scatter_kv(kv: Sequence[KVPages], pages: np.ndarray, rows: KVRows) -> None:
    """See `Backend.scatter_kv`."""
    count, heads, page_size, dim = kv[0].keys.shape
    check_pages(pages, count, written=True)
    rows.check((len(pages) * page_size, len(kv), heads, dim), kv[0].keys.dtype, kv[0].scales is not None)
    _write(kv, slots_of(pages, page_size), rows)


def _bytes(x: torch.Tensor) -> torch.Tensor:
    """[…, bytes of a value]: not every type can be read and written by index."""
    return x.view(torch.uint8).view(*x.shape, x.itemsize)


def _read(kv: Sequence[KVPages], slots: np.ndarray) -> KVRows:
    page_size = kv[0].keys.shape[2]
    at = torch.from_numpy(slots).long().to(kv[0].keys.device)
    page, offset = at // page_size, at % page_size
    keys, values = (
        torch.stack([_bytes(getattr(layer, name))[page, :, offset] for layer in kv], 1).view(kv[0].keys.dtype).squeeze(-1)
        for name in ("keys", "values")
    )
    scales = [layer.scales[page, :, :, offset] for layer in kv if layer.scales is not None]
    return KVRows(keys, values, torch.stack(scales, 1) if scales else None)


def _write(kv: Sequence[KVPages], slots: np.ndarray, rows: KVRows) -> None:
    page_size = kv[0].keys.shape[2]
    at = torch.from_numpy(slots).long().to(kv[0].keys.device)
    page, offset = at // page_size, at % page_size
    for number, layer in enumerate(kv):
        _bytes(layer.keys)[page, :, offset] = _bytes(rows.keys[:, number].contiguous())
        _bytes(layer.values)[page, :, offset] = _bytes(rows.values[:, number].contiguous())
        if layer.scales is not None and rows.scales is not None:
            layer.scales[page, :, :, offset] = rows.scales[:, number]
