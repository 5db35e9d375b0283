"""Drafts as trees, and what verification makes of them: what `Backend.verify` and `Backend.rejection_sample` take and give.

             ┌─ a ─┬─ b        rows      0  1  2  3  4
      root ──┤     └─ c        parents  -1  0  1  1  0         a path goes from the root to a row whose child nobody has drafted right
             └─ d              drafts    ·  a  b  c  d

The root of a request is its last token that is known; what is drafted stands behind it, or behind another draft. A chain of drafts is a
tree with one branch. Used by workers; every backend walks the same trees, on the host by `walk`, which is the reference for others.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

NO_TOKEN = -1
"""In place of the token of a row whose logits are invalid: a path ends before it."""


@dataclass(frozen=True, slots=True)
class DraftTrees:
    """The trees of R requests, over N rows of logits: request r owns rows starts[r] … starts[r + 1] - 1, perhaps none."""

    starts: Sequence[int]
    """[R + 1]."""
    parents: Sequence[int]
    """[N]: which row of its request, counted from 0, each row follows, an earlier one; -1 for the first row of a request, its root, and
    for no other. As `Batch.parents`, were the root the first row of its request in the batch."""
    drafts: Sequence[int]
    """[N]: the token of each row; that of a root is not looked at."""
    end_tokens: Sequence[Collection[int]]
    """[R]: the tokens that end a request."""

    @property
    def extents(self) -> list[tuple[int, int]]:
        """First row and the one behind the last, of each request."""
        return list(pairwise(self.starts))

    def check(self) -> None:
        """ValueError where these are no trees."""
        rows, starts, parents = len(self.parents), self.starts, self.parents
        if not starts or starts[0] != 0 or starts[-1] != rows:
            raise ValueError(f"starts {list(starts)} do not part {rows} rows among requests")
        if len(self.drafts) != rows or len(self.end_tokens) != len(starts) - 1:
            what = f"{len(self.drafts)} drafts for {rows} rows, {len(self.end_tokens)} sets of end tokens for {len(starts) - 1} requests"
            raise ValueError(f"{what}: there must be one each")
        for begin, end in pairwise(starts):
            if end < begin:
                raise ValueError(f"starts {list(starts)} do not part {rows} rows among requests")
            row = -1
            for parent in parents[begin:end]:
                if not -1 < parent <= row and (row >= 0 or parent != -1):
                    raise ValueError(
                        f"row {row + 1} of the request from row {begin} on follows row {parent}: a root -1, others an earlier row"
                    )
                row += 1


@dataclass(frozen=True, slots=True)
class Verified:
    """For each request, the path that was right."""

    rows: list[list[int]]
    """Its rows, counted from 0, the root first; those after the root are drafts that are accepted. None of a request without rows, or whose
    root's logits are invalid."""
    tokens: list[list[int]]
    """What is emitted: behind each of these rows a token. All but the last are the accepted drafts. An end token is the last."""


def chains(drafts: Sequence[Sequence[int]], end_tokens: Sequence[Collection[int]]) -> DraftTrees:
    """Trees of one branch: a root and its drafts, for each request."""
    starts, parents, tokens = [0], [], []
    for draft in drafts:
        parents += range(-1, len(draft))
        tokens += (NO_TOKEN, *draft)
        starts.append(len(parents))
    return DraftTrees(starts, parents, tokens, end_tokens)


def walk(trees: DraftTrees, tokens: Sequence[int]) -> Verified:
    """See `Backend.verify`."""
    trees.check()
    if len(tokens) != len(trees.parents):
        raise ValueError(f"{len(tokens)} tokens for {len(trees.parents)} rows: there must be one each")
    parents, drafts, verified = trees.parents, trees.drafts, Verified([], [])
    for begin, end, ends in zip(trees.starts, trees.starts[1:], trees.end_tokens, strict=False):
        rows, emitted = [], []
        if begin < end and (token := tokens[begin]) >= 0:
            row = 0
            rows.append(row)
            emitted.append(token)
            # Children stand behind their parents: one pass finds the whole path.
            for child in range(begin + 1, end):
                if parents[child] == row and drafts[child] == token:
                    if token in ends or tokens[child] < 0:
                        break
                    row, token = child - begin, tokens[child]
                    rows.append(row)
                    emitted.append(token)
        verified.rows.append(rows)
        verified.tokens.append(emitted)
    return verified
