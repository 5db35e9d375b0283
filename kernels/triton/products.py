"""How the work of a product is cut, the same for every kind of weight, and how its sums are stored.

many tokens   grid [tiles]           a program adds up all splits of K    ─▶ Y [T, N]
few tokens    grid [tiles, splits]   each split ─▶ partial [splits, T, N] ─▶ add_splits_kernel ─▶ Y

Tiles are numbered so that those which are computed at the same time share what they read: GROUPED tiles of T, with each tile of N in turn.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from headrace.kernels.triton.tiles import Kind, Rows, rows_of, split_of, whole_of
from headrace.kernels.triton.weights import DeviceWeight

_REDUCE_BLOCK = 1024
_GROUPED = tl.constexpr(8)


@dataclass(frozen=True, slots=True)
class Product:
    """x [T, K] times a weight [N, K], on its way to Y."""

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

    @classmethod
    def of(cls, w: DeviceWeight, y: torch.Tensor, tokens: int, width: int, kind: Kind, step: int, inputs: torch.dtype) -> "Product":
        """With a kernel of some `kind`, which takes `step` inputs of a type at a time."""
        split = split_of(w.outputs, w.inputs)
        splits = -(-w.inputs // split)
        rows = rows_of(tokens, kind, splits, step, w.values.itemsize / (2 if w.form == "nibbles" else 1), inputs.itemsize)
        whole = whole_of(tokens, splits)
        target = y if whole else torch.empty(splits, tokens, w.outputs, dtype=torch.float32, device=y.device)
        return cls(w, y, tokens, width, rows, split, whole, target)

    @property
    def splits(self) -> int:
        return -(-self.w.inputs // self.split)

    @property
    def grid(self) -> tuple[int, int]:
        tiles = triton.cdiv(self.w.outputs, self.rows.outputs) * triton.cdiv(self.tokens, self.rows.tokens)
        return tiles, 1 if self.whole else self.splits

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """T, N, K and what lies between rows of Y: the last arguments of a kernel."""
        return self.tokens, self.w.outputs, self.w.inputs, self.width

    @property
    def options(self) -> dict[str, int | bool]:
        """What every kernel of products is compiled with."""
        return {
            "SPLIT": self.split,
            "SPLITS": self.splits,
            "WHOLE": self.whole,
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
def tile_of(T, N, TOKENS: tl.constexpr, OUTPUTS: tl.constexpr):
    """The first output and the first token of this program."""
    program, tiles, across = tl.program_id(0), tl.cdiv(N, OUTPUTS), tl.cdiv(T, TOKENS)
    first = program // (_GROUPED * tiles) * _GROUPED
    grouped = tl.minimum(across - first, _GROUPED)
    inner = program - first * tiles
    return inner // grouped * OUTPUTS, (first + inner % grouped) * TOKENS


@triton.jit
def columns_of(rows, columns, K, EVEN: tl.constexpr):
    """What stands in these columns of rows of K; nothing is masked where K is EVEN, and so has no rest."""
    if EVEN:
        return tl.load(rows + columns)
    if rows.dtype.element_ty.is_int():
        return tl.load(rows + columns, mask=columns < K, other=0)
    return tl.load(rows + columns, mask=columns < K, other=0.0)


@triton.jit
def store_product(Y, total, bias, outputs, tokens, split, T, N, width, WHOLE: tl.constexpr, BIAS: tl.constexpr):
    """A tile [outputs, tokens] of sums with the bias to Y [T, N], whose rows lie `width` apart; or one split's to [splits, T, N]."""
    inside = (outputs < N)[:, None] & (tokens < T)[None, :]
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
