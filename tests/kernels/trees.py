"""Trees of drafts with logits, as tests of verification want them: of requests with no rows, with a root alone, chains and bushes."""

import random

import torch

from headrace.kernels.drafts import DraftTrees
from headrace.kernels.ops import SamplingBatch
from tests.kernels.draws import batch_of, logits_of, settings


def trees_of(dice: random.Random, sizes: list[int], vocabulary: int) -> DraftTrees:
    """Of so many rows; siblings have different tokens."""
    starts, parents, drafts = [0], [], []
    for size in sizes:
        taken: set[tuple[int, int]] = set()
        for row in range(size):
            free = [(parent, token) for parent in range(row) for token in range(vocabulary) if (parent, token) not in taken]
            # Early rows have more children: several are rejected there, one after the other.
            parent, token = dice.choice(free[: len(free) // 2 + 1]) if row else (-1, 0)
            taken.add((parent, token))
            parents.append(parent)
            drafts.append(token)
        starts.append(len(parents))
    ends = [dice.choice((frozenset[int](), frozenset[int](), frozenset({0, 1}), frozenset(range(vocabulary)))) for _ in sizes]
    return DraftTrees(starts, parents, drafts, ends)


def probabilities_of(dice: random.Random, trees: DraftTrees, vocabulary: int) -> torch.Tensor:
    """float32 [N, V]; some are 0, among them some of what is drafted."""
    weights = torch.rand(len(trees.parents), vocabulary, generator=torch.Generator().manual_seed(dice.randrange(99)))
    weights[weights < dice.choice((0.0, 0.3))] = 0.0
    return weights / weights.sum(1, keepdim=True).clamp_min(1e-9)


def rejection_case(
    dice: random.Random, shape: str, sizes: list[int], vocabulary: int
) -> tuple[torch.Tensor, SamplingBatch, DraftTrees, torch.Tensor]:
    """Arguments of `Backend.rejection_sample`. Some logits are invalid."""
    trees = trees_of(dice, sizes, min(vocabulary, 7))
    rows = len(trees.parents)
    logits = logits_of(shape, rows, vocabulary, dice.randrange(99))
    for row in range(rows):
        if dice.random() < 0.05:
            logits[row, dice.randrange(vocabulary)] = torch.nan
        elif dice.random() < 0.03:
            logits[row] = -torch.inf
    for begin, end in trees.extents:
        for row in range(begin + 1, end):
            # Drafts that are likely, so that some are accepted.
            if dice.random() < 0.4:
                before = logits[begin + trees.parents[row]]
                most = before.max()
                before[before == torch.inf] = 0.0
                before[trees.drafts[row]] = most + 1
    probabilities = probabilities_of(dice, trees, vocabulary)
    if dice.random() < 0.5:
        # A draft that knows the target well.
        probabilities = (0.9 * logits.nan_to_num(0.0, 0.0, 0.0).softmax(1) + 0.1 * probabilities).float()
    asked = [settings(dice, vocabulary) for _ in range(rows)]
    plain = [{"temperature": 1.5, "seed": one["seed"], "position": one["position"]} for one in asked]
    return logits, batch_of(*(dice.choice(pair) for pair in zip(asked, plain, strict=True))), trees, probabilities
