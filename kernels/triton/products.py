"""How the work of a product is cut, the same for every kind of weight, and how its sums are stored.

many tokens   grid [tiles]           a program adds up all splits of K    ─▶ Y [T, N]
few tokens    grid [tiles, splits]   each split ─▶ partial [splits, T, N] ─▶ add_splits_kernel ─▶ Y

Rows of Y may be those of experts: each is a row of X times the weight of one of them, in tiles that hold rows of one alone (`Tiles`).

Tiles are numbered so that those which are computed at the same time share what they read: GROUPED tiles of T, with each tile of N in turn.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from headrace.kernels.triton.tiles import EXPERT_TOKENS, Kind, Rows, rows_of, split_of, whole_of
from headrace.kernels.triton.weights import DeviceWeight

_REDUCE_BLOCK = 1024
_GROUPED = tl.constexpr(8)


@dataclass(frozen=True, slots=True)
class Tiles:
    """Which rows of Y are made with the weight of which expert: pairs of a token and one of its experts."""

    table: torch.Tensor
    """int32 [tiles, 3]: an expert, its first row of Y in the tile, and the one behind its last; 0 and 0 where the tile has none."""
    order: torch.Tensor
    """int32 [pairs]: the pair that each row of Y is, token * used + place."""
    used: int
    """Experts of a token, whose row of X is meant for all of them; 0 where X has a row for each row of Y."""
    tokens: int
    """Rows of a tile at most: one of EXPERT_TOKENS."""


@dataclass(frozen=True, slots=True)
class Product:
    """x [T, K] times a weight [N, K], or those of experts, on its way to Y."""

    w: DeviceWeight
    y: torch.Tensor
    """Where the result goes: from its first column on, rows `width` apart."""
    tokens: int
    width: int
    rows: Rows
    split: int
    """Inputs of a split."""
    whole: bool
    """Whether a program adds up all splits."""
    target: torch.Tensor
    """Where a kernel stores: Y, or float32 [splits, T, N]."""
    tiles: Tiles | None
    """Where Y has rows of experts; `tokens` counts those."""

    @classmethod
    def of(
        cls, w: DeviceWeight, y: torch.Tensor, width: int, kind: Kind, step: int, inputs: torch.dtype, tiles: Tiles | None = None
    ) -> "Product":
        """With a kernel of some `kind`, which takes `step` inputs of a type at a time."""
        tokens = len(y)
        split = split_of(w.outputs, w.inputs)
        splits = -(-w.inputs // split)
        rows = rows_of(
            tokens if tiles is None else tiles.tokens,
            kind,
            splits,
            step,
            w.values.itemsize / (2 if w.form == "nibbles" else 1),
            inputs.itemsize,
        )
        whole = whole_of(tokens, splits) if tiles is None else splits == 1 or rows.tokens > EXPERT_TOKENS[0]
        target = y if whole else torch.empty(splits, tokens, w.outputs, dtype=torch.float32, device=y.device)
        return cls(w, y, tokens, width, rows, split, whole, target, tiles)

    @property
    def splits(self) -> int:
        return -(-self.w.inputs // self.split)

    @property
    def grid(self) -> tuple[int, int]:
        across = triton.cdiv(self.tokens, self.rows.tokens) if self.tiles is None else len(self.tiles.table)
        return triton.cdiv(self.w.outputs, self.rows.outputs) * across, 1 if self.whole else self.splits

    @property
    def sizes(self) -> tuple[int | torch.Tensor | None, ...]:
        """Rows of X, N, K, what lies between rows of Y, how many there are, and what `tile_of` reads: the last arguments of a kernel."""
        tiles, sizes = self.tiles, (self.w.outputs, self.w.inputs, self.width, self.tokens)
        if tiles is None:
            return self.tokens, *sizes, 0, None, None
        return self.tokens // max(1, tiles.used), *sizes, len(tiles.table), tiles.table, tiles.order

    @property
    def options(self) -> dict[str, int | bool]:
        """What every kernel of products is compiled with."""
        return {
            "SPLIT": self.split,
            "SPLITS": self.splits,
            "WHOLE": self.whole,
            "USED": -1 if self.tiles is None else self.tiles.used,
            "BIAS": self.w.bias is not None,
            "TOKENS": self.rows.tokens,
            "OUTPUTS": self.rows.outputs,
            "num_warps": self.rows.warps,
            "num_stages": self.rows.stages,
        }

    def finish(self) -> None:
        """Add up what the splits gave, if a kernel has not."""
        if self.whole:
            return
        outputs, bias = self.w.outputs, self.w.bias
        grid = (self.tokens, triton.cdiv(outputs, _REDUCE_BLOCK))
        options = {"SPLITS": self.splits, "BIAS": bias is not None, "BLOCK": _REDUCE_BLOCK}
        add_splits_kernel[grid](self.target, bias, self.y, self.tokens, outputs, self.width, **options)


@triton.jit
def tile_of(table, order, across, T, N, TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, USED: tl.constexpr):
    """What this program makes: its first output, rows of Y [TOKENS], the rows of X that these are made of, the row of Y behind the last, 0
    where there is none, and the expert. Without experts (USED < 0) all are T rows of X, and expert 0 has the weight."""
    program, tiles = tl.program_id(0), tl.cdiv(N, OUTPUTS)
    if USED < 0:
        across = tl.cdiv(T, TOKENS)
    first = program // (_GROUPED * tiles) * _GROUPED
    grouped = tl.minimum(across - first, _GROUPED)
    inner = program - first * tiles
    tile = first + inner % grouped
    # What is read twice at the edges is not stored.
    if USED < 0:
        tokens, end, expert = tile * TOKENS + tl.arange(0, TOKENS), T, tl.full([], 0, tl.int64)
        sources = tl.minimum(tokens, T - 1)
    else:
        expert, begin, last = tl.load(table + 3 * tile).to(tl.int64), tl.load(table + 3 * tile + 1), tl.load(table + 3 * tile + 2)
        tokens, end = begin + tl.arange(0, TOKENS), tl.where(begin < last, last, 0)
        sources = tl.minimum(tokens, tl.maximum(last - 1, 0))
        if USED > 0:
            sources = tl.load(order + sources) // USED
    return inner // grouped * OUTPUTS, tokens, sources, end, expert


@triton.jit
def splits_of(end, SPLITS: tl.constexpr, WHOLE: tl.constexpr, USED: tl.constexpr):
    """The first split that this program adds up and the one behind its last: all, its own, or none where a tile has no rows (`tile_of`)."""
    if WHOLE:
        first, last = 0, SPLITS
    else:
        first = tl.program_id(1)
        last = first + 1
    if USED >= 0:
        last = tl.where(end > 0, last, first)
    return first, last


@triton.jit
def columns_of(rows, columns, K, EVEN: tl.constexpr):
    """What stands in these columns of rows of K; nothing is masked where K is EVEN, and so has no rest."""
    if EVEN:
        return tl.load(rows + columns)
    if rows.dtype.element_ty.is_int():
        return tl.load(rows + columns, mask=columns < K, other=0)
    return tl.load(rows + columns, mask=columns < K, other=0.0)


@triton.jit
def store_product(Y, total, bias, outputs, tokens, end, split, T, N, width, WHOLE: tl.constexpr, BIAS: tl.constexpr):
    """A tile [outputs, tokens] of sums with the bias to Y [T, N], whose rows lie `width` apart; or one split's to [splits, T, N]. Rows from
    `end` on are not stored."""
    inside = (outputs < N)[:, None] & (tokens < end)[None, :]
    y_rows = tokens.to(tl.int64)[None, :]
    if WHOLE:
        if BIAS:
            total += tl.load(bias + outputs, mask=outputs < N, other=0.0)[:, None]
        tl.store(Y + y_rows * width + outputs[:, None], total.to(Y.dtype.element_ty), mask=inside)
    else:
        tl.store(Y + (split.to(tl.int64) * T + y_rows) * N + outputs[:, None], total, mask=inside)


@triton.jit(do_not_specialize=["T"])
def add_splits_kernel(partial, bias, Y, T, N, width, SPLITS: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """Y[t, n] = 0 + partial[0, t, n] + partial[1, t, n] + … in this order."""
    token = tl.program_id(0).to(tl.int64)
    outputs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = outputs < N
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(SPLITS):
        total += tl.load(partial + (split * T.to(tl.int64) + token) * N + outputs, mask=inside, other=0.0)
    if BIAS:
        total += tl.load(bias + outputs, mask=inside, other=0.0)
    tl.store(Y + token * width + outputs, total.to(Y.dtype.element_ty), mask=inside)
