"""Causal attention over paged keys and values: decode, prefill and the verification of trees alike (arXiv:2205.14135).

Positions are cut, from 0 up, into splits of KV_SPLIT. A split's softmax is computed from nothing, block by block; the splits' results
are merged in order:

    one program, all splits of a tile       many tiles (prefill)
    a program a split, then `merge_kernel`  few tiles (decode)

Both merge by the same operations, and a block or a split of which a row sees nothing changes no bit of it. So a row does not notice how
the work was cut, which rows share its tile, or what else is in the batch.
"""

import math

import torch
import triton
import triton.language as tl

from headrace.kernels.ops import HeadShape
from headrace.kernels.triton.pages import KVPages
from headrace.kernels.triton.rounding import byte_value, e4m3_value
from headrace.kernels.triton.step import StepTokens
from headrace.kernels.triton.tiles import KV_SPLIT, PROGRAMS, QUERY_ROWS, generation, power_of_two, precision_of

_LOG2_E = math.log2(math.e)
_NOTHING = tl.constexpr(-1e30)
"""The highest score of a row that has seen no position yet: finite, so that no difference of infinities arises."""
_LARGER = tl.constexpr(256.0)
"""Scales of values are multiplied by this until the end, so that weights times them are no subnormal float16 where values are small."""


@triton.jit
def merged(highest, total, more_highest, more_total):
    """Two parts of a row's softmax as one: its highest score and total, and by how much the parts' outputs count."""
    top = tl.maximum(highest, more_highest)
    mine, theirs = tl.exp2(highest - top), tl.exp2(more_highest - top)
    return top, tl.fma(more_total, theirs, total * mine), mine, theirs


@triton.jit
def attend(
    n,
    to,
    q,
    last,
    first,
    highest,
    total,
    acc,
    keys,
    values,
    scales,
    pages,
    path,
    base,
    kv_head,
    scale,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    TREE: tl.constexpr,
    SCALED: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A row's softmax so far, with the positions from n on. Without MASKED every row sees all of them, and gets the same bits for less."""
    position = n + tl.arange(0, BLOCK)
    known = position < to
    at = tl.arange(0, WIDTH)
    stored = position
    if TREE:
        step = position - base
        stored = base + tl.load(path + step, mask=known & (step >= 0), other=0)
        stored = tl.where(step >= 0, stored, position)
    if MASKED:
        page = tl.load(pages + stored // PAGE, mask=known, other=0).to(tl.int64)
    else:
        page = tl.load(pages + stored // PAGE).to(tl.int64)
    slot = (page * KV_HEADS + kv_head) * PAGE + stored % PAGE
    k_at = keys + slot[:, None] * DIM + at[None, :]
    v_at = values + slot[:, None] * DIM + at[None, :]
    if MASKED:
        k, v = masked(k_at, known[:, None] & (at < DIM)[None, :]), masked(v_at, known[:, None] & (at < DIM)[None, :])
    elif WIDTH != DIM:
        k, v = masked(k_at, (at < DIM)[None, :]), masked(v_at, (at < DIM)[None, :])
    else:
        k, v = tl.load(k_at), tl.load(v_at)
    if keys.dtype.element_ty == tl.uint8:
        k, v = e4m3_value(k), e4m3_value(v)
    elif keys.dtype.element_ty == tl.int8:
        k, v = byte_value(k), byte_value(v)
    scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION)
    if SCALED:
        scale_at = scales + (page * KV_HEADS + kv_head) * 2 * PAGE + stored % PAGE
        k_scale, v_scale = (
            (tl.load(scale_at, mask=known, other=0.0), tl.load(scale_at + PAGE, mask=known, other=0.0))
            if MASKED
            else (tl.load(scale_at), tl.load(scale_at + PAGE))
        )
        scores *= k_scale[None, :]
    if MASKED:
        seen = (position[None, :] <= last[:, None]) & (position[None, :] >= first[:, None]) & known[None, :]
        scores = tl.where(seen, scores, _NOTHING)
    higher = tl.maximum(highest, tl.max(scores, 1) * scale)
    weights = tl.exp2(tl.fma(scores, tl.full(scores.shape, scale, tl.float32), tl.broadcast_to(-higher[:, None], scores.shape)))
    if MASKED:
        weights = tl.where(seen, weights, 0.0)
    fade = tl.exp2(highest - higher)
    total = tl.fma(total, fade, tl.sum(weights, 1))
    if SCALED:
        weights *= v_scale[None, :] * _LARGER
    acc = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc * fade[:, None], input_precision=PRECISION)
    return higher, total, acc


@triton.jit
def masked(at, mask):
    """What stands there, or 0."""
    if at.dtype.element_ty.is_int():
        return tl.load(at, mask=mask, other=0)
    return tl.load(at, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["table_width", "path_width", "splits"])
def attention_kernel(
    Q,
    keys,
    values,
    scales,
    tiles,
    positions,
    pages,
    query_start,
    paths,
    state,
    partial,
    OUT,
    scale,
    table_width,
    path_width,
    splits,
    QUERY_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    TREE: tl.constexpr,
    SCALED: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    PAGE: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """All splits of a tile to OUT [T, Hq, D] (WHOLE), or one of them to state [T, Hq, splits, 2] and partial [T, Hq, splits, WIDTH]."""
    GROUP: tl.constexpr = QUERY_HEADS // KV_HEADS
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    request, begin, end = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    rows = tl.arange(0, ROWS)
    token = begin + rows // GROUP
    live = token < end
    last = tl.load(positions + token, mask=live, other=-1)
    limit = tl.max(last, 0) + 1
    if WINDOW:
        first = tl.maximum(last - WINDOW + 1, 0)
        lowest = tl.min(tl.where(live, first, limit), 0)
    else:
        first = tl.zeros_like(last)
        lowest = 0
    if WHOLE:
        start, behind = lowest // SPLIT, (limit + SPLIT - 1) // SPLIT
    else:
        start = tl.program_id(2)
        seen_by_some = (start >= lowest // SPLIT) & (start * SPLIT < limit)
        behind = tl.where(seen_by_some, start + 1, start)
    at = tl.arange(0, WIDTH)
    inside = live[:, None] & (at < DIM)[None, :]
    head = kv_head * GROUP + rows % GROUP
    place = token.to(tl.int64) * QUERY_HEADS + head
    q = tl.load(Q + place[:, None] * DIM + at[None, :], mask=inside, other=0.0)
    base = 0
    if TREE:
        base = tl.load(positions + tl.load(query_start + request))
    highest = tl.full([ROWS], _NOTHING, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, WIDTH], tl.float32)
    # The positions that all rows see lie between these.
    everyone_from = tl.max(tl.where(live, first, 0), 0)
    everyone_to = tl.min(tl.where(live, last, limit), 0) + 1
    table, path = pages + request.to(tl.int64) * table_width, paths
    if TREE:
        path += begin.to(tl.int64) * path_width
    for split in range(start, behind):
        top = tl.full([ROWS], _NOTHING, tl.float32)
        sum = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, WIDTH], tl.float32)
        from_, to = tl.maximum(split * SPLIT, lowest // BLOCK * BLOCK), tl.minimum((split + 1) * SPLIT, limit)
        plain_from = from_
        if WINDOW:
            plain_from = tl.maximum(from_, (tl.minimum(everyone_from, to) + BLOCK - 1) // BLOCK * BLOCK)
        plain_to = tl.maximum(plain_from, tl.minimum(to, everyone_to) // BLOCK * BLOCK)
        if WINDOW:
            for n in range(from_, plain_from, BLOCK):
                top, sum, acc = attend(n, to, q, last, first, top, sum, acc, keys, values, scales, table, path, base, kv_head, scale,
                                       KV_HEADS, DIM, TREE, SCALED, True, PRECISION, PAGE, BLOCK, WIDTH)  # fmt: skip
        for n in range(plain_from, plain_to, BLOCK):
            top, sum, acc = attend(n, to, q, last, first, top, sum, acc, keys, values, scales, table, path, base, kv_head, scale,
                                   KV_HEADS, DIM, TREE, SCALED, False, PRECISION, PAGE, BLOCK, WIDTH)  # fmt: skip
        for n in range(plain_to, to, BLOCK):
            top, sum, acc = attend(n, to, q, last, first, top, sum, acc, keys, values, scales, table, path, base, kv_head, scale,
                                   KV_HEADS, DIM, TREE, SCALED, True, PRECISION, PAGE, BLOCK, WIDTH)  # fmt: skip
        if WHOLE:
            highest, total, mine, theirs = merged(highest, total, top, sum)
            out = tl.fma(acc, tl.broadcast_to(theirs[:, None], [ROWS, WIDTH]), out * mine[:, None])
        else:
            cell = place * splits + split
            tl.store(state + 2 * cell, top, mask=live)
            tl.store(state + 2 * cell + 1, sum, mask=live)
            tl.store(partial + cell[:, None] * WIDTH + at[None, :], acc, mask=live[:, None])
    if WHOLE:
        if SCALED:
            total *= _LARGER
        tl.store(OUT + place[:, None] * DIM + at[None, :], (out / total[:, None]).to(OUT.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["splits"])
def merge_kernel(
    positions,
    state,
    partial,
    OUT,
    splits,
    QUERY_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALED: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The splits' results of a row, merged in order: OUT [T, Hq, D]."""
    token = tl.program_id(0).to(tl.int64)
    place = token * QUERY_HEADS + tl.program_id(1)
    last = tl.load(positions + token)
    first = 0
    if WINDOW:
        first = tl.maximum(last - WINDOW + 1, 0) // SPLIT
    at = tl.arange(0, WIDTH)
    # Scalars as vectors of one: they are merged by the same operations as a tile's rows.
    highest = tl.full([1], _NOTHING, tl.float32)
    total = tl.zeros([1], tl.float32)
    out = tl.zeros([1, WIDTH], tl.float32)
    for split in range(first, last // SPLIT + 1):
        cell = place * splits + split + tl.arange(0, 1)
        top, sum = tl.load(state + 2 * cell), tl.load(state + 2 * cell + 1)
        acc = tl.load(partial + cell[:, None] * WIDTH + at[None, :])
        highest, total, mine, theirs = merged(highest, total, top, sum)
        out = tl.fma(acc, tl.broadcast_to(theirs[:, None], [1, WIDTH]), out * mine[:, None])
    inside = (at < DIM)[None, :]
    if SCALED:
        total *= _LARGER
    tl.store(OUT + place * DIM + at[None, :], (out / total[:, None]).to(OUT.dtype.element_ty), mask=inside)


def attention(
    q: torch.Tensor, heads: HeadShape, kv: KVPages, tokens: StepTokens, scale: float, window: int | None, out: torch.dtype
) -> torch.Tensor:
    """softmax(q k^T * scale) v for q [T, Hq * D]: [T, Hq * D] of type `out`."""
    y = torch.empty(q.shape, dtype=out, device=q.device)
    if not len(q):
        return y
    tiles, width = tokens.tiles(heads.query_heads // heads.kv_heads), max(16, power_of_two(heads.dim))
    at_once = generation().positions
    whole = tokens.splits == 1 or tiles.count * heads.kv_heads >= PROGRAMS
    state = partial = None
    if not whole:
        cells = len(q) * heads.query_heads * tokens.splits
        state, partial = (torch.empty(cells * each, dtype=torch.float32, device=q.device) for each in (2, width))
    attention_kernel[(tiles.count, heads.kv_heads, 1 if whole else tokens.splits)](
        q,
        kv.keys,
        kv.values,
        kv.scales,
        tiles.table,
        tokens.positions,
        tokens.pages,
        tokens.query_start,
        tokens.paths,
        state,
        partial,
        y,
        scale * _LOG2_E,
        tokens.pages.shape[1],
        0 if tokens.paths is None else tokens.paths.shape[1],
        tokens.splits,
        QUERY_HEADS=heads.query_heads,
        KV_HEADS=heads.kv_heads,
        DIM=heads.dim,
        WINDOW=window or 0,
        TREE=tokens.paths is not None,
        SCALED=kv.scales is not None,
        WHOLE=whole,
        PRECISION=precision_of(kv.multiplied_as),
        PAGE=kv.page_size,
        SPLIT=KV_SPLIT,
        ROWS=max(QUERY_ROWS, power_of_two(heads.query_heads // heads.kv_heads)),
        BLOCK=at_once.block,
        WIDTH=width,
        num_warps=at_once.warps,
        num_stages=at_once.stages,
    )
    if not whole:
        merge_kernel[(len(q), heads.query_heads)](
            tokens.positions,
            state,
            partial,
            y,
            tokens.splits,
            QUERY_HEADS=heads.query_heads,
            DIM=heads.dim,
            WINDOW=window or 0,
            SCALED=kv.scales is not None,
            SPLIT=KV_SPLIT,
            WIDTH=width,
            num_warps=1,
        )
    return y
