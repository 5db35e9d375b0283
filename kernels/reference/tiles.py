"""Matrix products whose rows do not know their neighbours.

A BLAS picks its kernel, and with it the order of its sums, from the shape of the call: row 0 of a product of one row and row 0
of a product of 32 may differ in the last bit. Here no such choice is left to it:

    a [M, K]  ──cut and zero-padded──▶  tiles [8, K] or [32, K]  ──one BLAS call each──▶  [M, N]

K and N are padded to multiples of 16 by whoever prepares the operands, so a call's shape never has a ragged edge. That leaves
three ways to leak: a row's place within its tile, the size of the tile, and the number of threads. All are tried out for each (K, N), on
the very machine, before the first product of that shape; where the small and the large tile disagree only the small one is used, and
where a row's place or the threads matter rows go one to a call. So the invariance does not rest on what a BLAS happens to do. MKL in its
strict mode promises that threads do not matter; it breaks that with AVX-512 otherwise, and on AMD's machines for few outputs all the same.
"""

import os
from functools import cache

import torch
import torch.nn.functional as F

# Conditional numerical reproducibility (oneMKL developer guide). MKL reads it before its first product; a user's own choice stands.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

ALIGN = 16
"""K and N of every product are multiples of this."""

SMALL, LARGE = 8, 32
"""Rows of a tile: few for decoding, many for prefill."""

THREADS = (1, 2, 3, 4, 8)
"""Numbers of threads that are tried out."""


def padded(size: int) -> int:
    """`size` rounded up to a multiple of ALIGN."""
    return -(-size // ALIGN) * ALIGN


def pad_last(x: torch.Tensor) -> torch.Tensor:
    """x with its last dimension zero-padded to a multiple of ALIGN; x itself where nothing is missing."""
    missing = padded(x.shape[-1]) - x.shape[-1]
    return F.pad(x, (0, missing)) if missing else x


def tiles_of(rows: int, sizes: tuple[int, ...]) -> int:
    """Rows of the tile to use for `rows` rows: the largest of `sizes` unless a smaller one holds them all."""
    return next((size for size in sizes if rows <= size), sizes[-1])


def product(a: torch.Tensor, b: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
    """a [M, K] times b [K, N], in tiles of one of `sizes` (from `trusted_tiles`): [M, N]. K and N are multiples of ALIGN."""
    rows = a.shape[0]
    tile = tiles_of(rows, sizes)
    whole = -(-rows // tile) * tile
    a = F.pad(a, (0, 0, 0, whole - rows)) if whole != rows else a.contiguous()
    if whole == tile:
        return torch.mm(a, b)[:rows]
    out = a.new_empty(whole, b.shape[1])
    for start in range(0, whole, tile):
        torch.mm(a[start : start + tile], b, out=out[start : start + tile])
    return out[:rows]


def trusted_tiles(b: torch.Tensor) -> tuple[int, ...]:
    """Tile sizes, smallest first, that all give a row the same bits wherever it stands, for products with [..., K, N] like `b`.

    Tried once for each shape, layout and device, with `b` itself as the right-hand side; a 3-D `b` stands for `torch.bmm`.
    """
    key = (tuple(b.shape), b.stride(-1) == 1, str(b.device))
    if key not in _trusted:
        _trusted[key] = _try_out(b)
    return _trusted[key]


_trusted: dict[tuple, tuple[int, ...]] = {}


def _try_out(b: torch.Tensor) -> tuple[int, ...]:
    a = _sample(b.shape[:-2], b.shape[-2]).to(b.device)
    small = torch.matmul(a[..., :SMALL, :].contiguous(), b)
    moved = torch.matmul(a[..., 3 : 3 + SMALL, :].contiguous(), b)
    if not torch.equal(small[..., 3:, :], moved[..., : SMALL - 3, :]) or _threads_matter(a[..., :SMALL, :].contiguous(), b):
        return (1,)
    large = torch.matmul(a, b)
    # a turn by 5 links every place of the tile with every other, as 5 and LARGE have no common divisor
    turned = torch.matmul(a.roll(-5, -2), b).roll(5, -2)
    agree = torch.equal(large[..., :SMALL, :], small) and torch.equal(large, turned)
    return (SMALL, LARGE) if agree and not _threads_matter(a, b) else (SMALL,)


def _threads_matter(a: torch.Tensor, b: torch.Tensor) -> bool:
    if b.device.type != "cpu":
        return False
    before, outs = torch.get_num_threads(), []
    for count in (*THREADS, before):
        torch.set_num_threads(count)
        outs.append(torch.matmul(a, b))
    return not all(torch.equal(out, outs[0]) for out in outs)


@cache
def _sample(batch: tuple[int, ...], k: int) -> torch.Tensor:
    return torch.randn(*batch, LARGE, k, generator=torch.Generator().manual_seed(20))
