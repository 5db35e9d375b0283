"""Speculative sampling over trees of drafts: which are accepted, by dice, and what is emitted behind the last that is.

What target and draft of a row become is held without ever being written down. With a(y) and b(y) their weights as they were, whole numbers,
what is left of the target is after each rejection

    rest(y) = max(a(y) - [slope * b(y)], 0),   slope' = slope + mass / left,   mass = sum of rest,   left = sum of b over what was not tried

for max(max(a - s b, 0) - t b, 0) = max(a - (s + t) b, 0), and a token that was rejected has a rest of 0 from then on, since it was rejected
for being less likely than drafted. So one number a row is all there is to know of its past.

Whole numbers make sums exact in any order; slopes and ratios are quotients of float64, each rounded once. Every implementation that keeps
to both emits the same tokens. The draw after the last child walks tokens by id: unlike in `sampling`, nothing is in order there.
"""

from collections.abc import Sequence

import numpy as np
import torch

from headrace.kernels.drafts import DraftTrees, Verified
from headrace.kernels.ops import SamplingBatch
from headrace.kernels.philox import uniform
from headrace.kernels.reference.sampling import UNIT, Integers, distribution

MOST = float(1 << 62)
"""What is taken from a weight at once, at most: every weight is less."""


def rejection_sample(logits: torch.Tensor, batch: SamplingBatch, trees: DraftTrees, probabilities: torch.Tensor) -> Verified:
    """See `Backend.rejection_sample`."""
    following = check(trees, logits.shape, probabilities.shape)
    targets, drafted = logits.cpu().numpy(), probabilities.cpu().numpy()
    for row, children in enumerate(following):
        check_probabilities(not children or bool(((drafted[row] >= 0) & (drafted[row] <= 1)).all()), row)
    verified = Verified([], [])
    for (begin, end), ends in zip(trees.extents, trees.end_tokens, strict=True):
        rows, emitted = [], []
        row: int | None = begin if begin < end else None
        while row is not None:
            children = following[row]
            try:
                target = distribution(targets[row], batch, row)
            except FloatingPointError:
                break
            draft = (drafted[row].astype(np.float64) * UNIT).astype(np.int64) if children else np.zeros_like(target)
            token, turn = _decide(target, draft, [trees.drafts[child] for child in children], batch.seed[row], batch.position[row])
            rows.append(row - begin)
            emitted.append(token)
            row = None if turn is None or token in ends else children[turn]
        verified.rows.append(rows)
        verified.tokens.append(emitted)
    return verified


def check(trees: DraftTrees, logits: Sequence[int], probabilities: Sequence[int]) -> list[list[int]]:
    """The children of each row, all of them counted from the first row of all. ValueError where an argument does not fit the others."""
    trees.check()
    if len(logits) != 2 or logits[0] != len(trees.parents) or tuple(probabilities) != tuple(logits):
        raise ValueError(
            f"logits {list(logits)} and probabilities {list(probabilities)} for {len(trees.parents)} rows: both must be [rows, vocabulary]"
        )
    following: list[list[int]] = [[] for _ in trees.parents]
    for begin, end in trees.extents:
        for row in range(begin + 1, end):
            following[begin + trees.parents[row]].append(row)
            if not 0 <= trees.drafts[row] < logits[1]:
                raise ValueError(f"draft {trees.drafts[row]} of row {row} is not in the vocabulary of {logits[1]}")
    for row, children in enumerate(following):
        if len({trees.drafts[child] for child in children}) < len(children):
            raise ValueError(f"row {row} has children of the same token: drafts are drawn without replacement")
    return following


def check_probabilities(valid: bool, row: int) -> None:
    if not valid:
        raise FloatingPointError(f"row {row} of the probabilities has some that are not from 0 to 1")


def _decide(target: Integers, draft: Integers, tokens: Sequence[int], seed: int, position: int) -> tuple[int, int | None]:
    """The token to be emitted, and which of the drafted `tokens` it is, accepted, or None."""
    rest, slope, mass, left = target, 0.0, int(target.sum()), int(draft.sum())
    for turn, token in enumerate(tokens):
        if not (share := int(draft[token])):
            continue
        if uniform(seed, position, turn + 1) < float(rest[token]) / float(mass) * (float(left) / float(share)):
            return token, turn
        slope += float(mass) / float(left)
        left -= share
        rest = np.maximum(target - np.minimum(draft * slope, MOST).astype(np.int64), 0)
        mass = int(rest.sum())
        if not mass:
            # By roundings alone: where nothing is left, nothing is rejected.
            rest, mass = target, int(target.sum())
            break
    number = int(uniform(seed, position) * (1 << 53)) * mass >> 53
    return int(rest.cumsum().searchsorted(number, side="right")), None
