"""Verification of trees of drafts by identity, where the sampled tokens are. A program a request, which holds its rows in registers."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from headrace.kernels.drafts import DraftTrees, Verified, walk
from headrace.kernels.triton.tiles import power_of_two


@triton.jit
def ends_with(token, end_tokens, begin, end):
    """Whether the token is one of those."""
    found = begin < 0
    for place in range(begin, end):
        found = found | (tl.load(end_tokens + place) == token)
    return found


@triton.jit
def verify_kernel(starts, parents, drafts, end_starts, end_tokens, tokens, path, emitted, counts, ROWS: tl.constexpr):
    """Rows and tokens from the request's first row on, and how many there are: path and emitted [N], counts [R]."""
    request = tl.program_id(0)
    begin, end = tl.load(starts + request), tl.load(starts + request + 1)
    first_end, last_end = tl.load(end_starts + request), tl.load(end_starts + request + 1)
    at = tl.arange(0, ROWS)
    inside = at < end - begin
    parent = tl.load(parents + begin + at, mask=inside, other=-2)
    draft = tl.load(drafts + begin + at, mask=inside, other=-1)
    sampled = tl.load(tokens + begin + at, mask=inside, other=-1)
    row, count = tl.where(begin < end, 0, ROWS), 0
    while row < ROWS:
        token = tl.sum(tl.where(at == row, sampled, 0), 0)
        if token < 0:
            row = ROWS
        else:
            tl.store(path + begin + count, row)
            tl.store(emitted + begin + count, token)
            count += 1
            following = tl.min(tl.where((parent == row) & (draft == token), at, ROWS), 0)
            row = tl.where(ends_with(token, end_tokens, first_end, last_end), ROWS, following)
    tl.store(counts + request, count)


@dataclass(frozen=True, slots=True)
class DeviceTrees:
    """`headrace.kernels.drafts.DraftTrees` on a device, int64, and room for what becomes of them."""

    starts: torch.Tensor
    parents: torch.Tensor
    drafts: torch.Tensor
    end_starts: torch.Tensor
    """[R + 1]: where the end tokens of each request begin."""
    end_tokens: torch.Tensor
    rows: int
    """Of the request that has most, rounded up to a power of two."""
    found: torch.Tensor
    """[2 N + R]: paths, emitted tokens, counts."""

    @classmethod
    def of(cls, trees: DraftTrees, device: torch.device) -> "DeviceTrees":
        """In one copy."""
        ends = [list(each) for each in trees.end_tokens]
        end_starts = np.cumsum([0, *map(len, ends)])
        arrays = [trees.starts, trees.parents, trees.drafts, end_starts, [token for each in ends for token in each]]
        flat = torch.from_numpy(np.concatenate([np.asarray(array, np.int64) for array in arrays])).to(device)
        most = max((end - begin for begin, end in trees.extents), default=1)
        found = torch.empty(2 * len(trees.parents) + len(ends), dtype=torch.int64, device=device)
        return cls(*flat.split([len(array) for array in arrays]), power_of_two(max(most, 1)), found)

    @property
    def requests(self) -> int:
        return len(self.starts) - 1

    def results(self) -> tuple[torch.Tensor, ...]:
        """The parts of `found`."""
        rows = len(self.parents)
        return self.found.split([rows, rows, self.requests])

    def verified(self, trees: DraftTrees) -> Verified:
        """What a kernel has found, on the host."""
        found, rows = self.found.tolist(), len(self.parents)
        extents = [(begin, begin + count) for begin, count in zip(trees.starts[:-1], found[2 * rows :], strict=True)]
        return Verified([found[begin:end] for begin, end in extents], [found[rows + begin : rows + end] for begin, end in extents])


def verify(trees: DraftTrees, tokens: Sequence[int] | torch.Tensor) -> Verified:
    """See `Backend.verify`. What is on the host is walked there: a launch and two copies take longer."""
    if not isinstance(tokens, torch.Tensor):
        return walk(trees, tokens)
    trees.check()
    if len(tokens) != len(trees.parents):
        raise ValueError(f"{len(tokens)} tokens for {len(trees.parents)} rows: there must be one each")
    on_device = DeviceTrees.of(trees, tokens.device)
    launch(on_device, tokens)
    return on_device.verified(trees)


def launch(trees: DeviceTrees, tokens: torch.Tensor) -> None:
    if trees.requests:
        verify_kernel[(trees.requests,)](
            trees.starts,
            trees.parents,
            trees.drafts,
            trees.end_starts,
            trees.end_tokens,
            tokens,
            *trees.results(),
            ROWS=trees.rows,
            num_warps=1 if trees.rows <= 64 else 4,
        )
