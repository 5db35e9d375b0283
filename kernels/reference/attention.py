"""Causal attention over paged keys and values, in splits of the KV positions combined in order (arXiv:2205.14135).

For each request, queries that share a KV head are rows of one matrix, cut into tiles (see `tiles.py`); keys and values are gathered
from their pages into splits of SPLIT positions. Splits lie at fixed positions of the sequence, counted from 0, and a tile walks
them upwards. A split of which a row sees nothing changes nothing in it, to the bit, so a row does not notice which other rows
share its tile.

    rows [tiles, Hkv, M, D]  ×  keys [splits, Hkv, SPLIT, D]  →  scores [tiles, Hkv, M, SPLIT] of one split at a time
"""

from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F

from headrace.kernels.ops import HeadShape
from headrace.kernels.reference.exact import exp, row_sum
from headrace.kernels.reference.step import KVPages, StepTokens
from headrace.kernels.reference.tiles import pad_last, tiles_of, trusted_tiles

SPLIT = 128
"""KV positions in a split."""

_NOTHING = -1e30
"""Running maximum of a row that has seen no position yet: finite, so that no difference of infinities arises."""


def attention(q: torch.Tensor, heads: HeadShape, kv: KVPages, tokens: StepTokens, scale: float, window: int | None) -> torch.Tensor:
    """softmax(q k^T * scale) v for q [T, Hq * D]: [T, Hq * D]."""
    out = torch.empty_like(q)
    starts = tokens.query_start.tolist()
    for request, (begin, end) in enumerate(pairwise(starts)):
        if begin == end:
            continue
        positions = tokens.positions[begin:end]
        base, page_size = int(positions[0]), kv.keys.shape[2]
        keys, values = kv.read(tokens.pages[request][: -(-(base + end - begin) // page_size)])
        parents = None if tokens.parents is None else tokens.parents[begin:end].tolist()
        if parents is None or parents == list(range(-1, end - begin - 1)):
            parts = [(slice(begin, end), torch.arange(base + end - begin))]
        else:
            # Each row of a tree alone, with its own path in order.
            parts = [(slice(begin + row, begin + row + 1), _path(base, parents, row)) for row in range(end - begin)]
        for rows, places in parts:
            places = places.to(q.device)
            seen = [_splits(x.index_select(1, places)) for x in (keys, values)]
            out[rows] = _one_request(q[rows], heads, *seen, tokens.positions[rows], scale, window)
    return out


def _path(base: int, parents: list[int], row: int) -> torch.Tensor:
    """Where keys and values lie of all that a row of a tree sees, by position."""
    path = []
    while row >= 0:
        path.append(base + row)
        row = parents[row]
    return torch.tensor([*range(base), *reversed(path)])


@cache
def _tile_sizes(kv_heads: int, dim: int, device: torch.device) -> tuple[int, ...]:
    """Tile sizes good for both products, tried on random keys and values."""
    split = torch.randn(kv_heads, SPLIT, dim, generator=torch.Generator().manual_seed(21)).to(device)
    for_values = trusted_tiles(split)
    return tuple(size for size in trusted_tiles(split.transpose(1, 2)) if size in for_values) or (1,)


def _splits(rows: torch.Tensor) -> torch.Tensor:
    """[Hkv, positions, D] as [splits, Hkv, SPLIT, D], zeros behind the positions and behind D."""
    kv_heads, context, _ = rows.shape
    splits = -(-context // SPLIT)
    rows = F.pad(pad_last(rows), (0, 0, 0, splits * SPLIT - context))
    return rows.view(kv_heads, splits, SPLIT, -1).transpose(0, 1).contiguous()


def _one_request(
    q: torch.Tensor,
    heads: HeadShape,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    tokens, group = q.shape[0], heads.query_heads // heads.kv_heads
    sizes = _tile_sizes(heads.kv_heads, keys.shape[-1], q.device)
    rows = tokens * group
    tile = tiles_of(rows, sizes)
    tiles = -(-rows // tile)

    # [T, Hkv, G, D] → rows (token, member of the group) of each KV head → tiles
    queries = q.view(tokens, heads.kv_heads, group, heads.dim).transpose(0, 1).reshape(heads.kv_heads, rows, heads.dim)
    queries = F.pad(pad_last(queries), (0, 0, 0, tiles * tile - rows))
    queries = queries.view(heads.kv_heads, tiles, tile, -1).transpose(0, 1).contiguous()
    # rows that only fill the last tile repeat its last position
    last = positions.repeat_interleave(group)
    last = torch.cat((last, last[-1:].expand(tiles * tile - rows))).view(tiles, 1, tile, 1)
    first = (last - (window - 1)).clamp_(min=0) if window is not None else torch.zeros_like(last)
    tile_first, tile_last = first.amin((1, 2, 3)).tolist(), last.amax((1, 2, 3)).tolist()

    out = queries.new_zeros(tiles, heads.kv_heads, tile, values.shape[-1])
    total = queries.new_zeros(tiles, heads.kv_heads, tile, 1)
    highest = torch.full_like(total, _NOTHING)
    scores = queries.new_empty(tiles, heads.kv_heads, tile, SPLIT)
    weighted = torch.empty_like(out)
    for split in range(keys.shape[0]):
        begin, end = split * SPLIT, (split + 1) * SPLIT
        seeing = [t for t in range(tiles) if tile_first[t] < end and tile_last[t] >= begin]
        if not seeing:
            continue
        now = slice(seeing[0], seeing[-1] + 1)
        for t in range(now.start, now.stop):
            torch.bmm(queries[t], keys[split].transpose(1, 2), out=scores[t])
        place = torch.arange(begin, end, device=q.device)
        hidden = (place > last[now]) | (place < first[now])
        part = (scores[now] * scale).masked_fill_(hidden, -torch.inf)
        higher = torch.maximum(highest[now], part.amax(-1, keepdim=True))
        # one call for both: what the split weighs, and how much what came before it fades
        part, fade = exp(torch.cat((part, highest[now]), -1).sub_(higher)).split((SPLIT, 1), -1)
        part = part.contiguous()
        highest[now] = higher
        total[now] = total[now].mul_(fade).add_(row_sum(part))
        for t in range(now.start, now.stop):
            torch.bmm(part[t - now.start], values[split], out=weighted[t])
        out[now] = out[now].mul_(fade).add_(weighted[now])
    out /= total
    out = out.transpose(0, 1).reshape(heads.kv_heads, tiles * tile, -1)[:, :rows, : heads.dim]
    return out.reshape(heads.kv_heads, tokens, group, heads.dim).transpose(0, 1).reshape(tokens, -1)
