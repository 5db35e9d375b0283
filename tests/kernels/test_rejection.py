"""Speculative sampling: what is emitted is distributed as what the target alone emits, whatever was drafted; by every backend alike."""

import random
from collections import Counter, defaultdict
from functools import cache

import numpy as np
import pytest
import torch

from headrace.kernels.drafts import DraftTrees, chains, walk
from headrace.kernels.philox import uniform
from headrace.kernels.reference import rejection, sampling
from headrace.kernels.reference.rejection import rejection_sample
from tests.kernels.draws import batch_of
from tests.kernels.trees import rejection_case

# The distribution

VOCABULARY, REQUESTS = 6, 2000
SHAPE = [-1, 0, 0, 0, 1, 1, 2]
"""Three children of the root, two of the first of them, one of the second."""

SETTINGS = {
    "as they are": {},
    "warm, of the four most likely": {"temperature": 1.7, "top_k": 4},
    "of the nucleus": {"top_p": 0.8},
    "of what is not unlikely": {"temperature": 0.8, "min_p": 0.15},
    "penalized": {"presence_penalty": 0.7, "output": (1, 2), "logit_bias": ((4, 0.8),)},
}


@cache
def target_logits(path: tuple[int, ...]) -> np.ndarray:
    """What the target says after these tokens."""
    return np.random.default_rng([7, *path]).normal(0, 1.4, VOCABULARY).astype(np.float32)


@cache
def draft_probabilities(path: tuple[int, ...]) -> np.ndarray:
    """What the drafter says: something like the target, too sure of itself, with one token that it never drafts."""
    noise = np.random.default_rng([8, *path]).normal(0, 1.5, VOCABULARY)
    weights = np.exp(1.5 * target_logits(path) + noise)
    weights[len(path) % VOCABULARY] = 0
    return (weights / weights.sum()).astype(np.float32)


def drafted(seed: int) -> tuple[list[tuple[int, ...]], list[int]]:
    """The path that leads to each row of a tree of SHAPE, and its token: siblings drawn without replacement."""
    dice = random.Random(seed)
    paths: list[tuple[int, ...]] = [()]
    tried: dict[int, list[int]] = defaultdict(list)
    for parent in SHAPE[1:]:
        weights = draft_probabilities(paths[parent]).astype(np.float64)
        weights[tried[parent]] = 0
        (token,) = dice.choices(range(VOCABULARY), weights.tolist())
        tried[parent].append(token)
        paths.append((*paths[parent], token))
    return paths, [0, *(path[-1] for path in paths[1:])]


def rows_of(paths: list[tuple[int, ...]], settings: dict, seed: int) -> list[dict]:
    """A row draws as settings say, its position is its depth."""
    return [settings | {"seed": seed, "position": 3 + len(path)} for path in paths]


def emitted(settings: dict) -> tuple[list[list[int]], float]:
    """What REQUESTS requests emit, and the drafts accepted of each."""
    made = [drafted(seed) for seed in range(REQUESTS)]
    size = len(SHAPE)
    trees = DraftTrees(
        [size * request for request in range(REQUESTS + 1)],
        SHAPE * REQUESTS,
        [token for _, tokens in made for token in tokens],
        [()] * REQUESTS,
    )
    every = [path for paths, _ in made for path in paths]
    batch = batch_of(*(row for seed, (paths, _) in enumerate(made) for row in rows_of(paths, settings, seed)))
    known = {path: (target_logits(path), draft_probabilities(path)) for path in set(every)}
    logits, probabilities = (torch.from_numpy(np.stack([known[path][which] for path in every])) for which in (0, 1))
    verified = rejection_sample(logits, batch, trees, probabilities)
    return verified.tokens, sum(len(rows) - 1 for rows in verified.rows) / REQUESTS


def chi_squares(answers: list[list[int]], settings: dict) -> tuple[float, int]:
    """The sum over all tables of what follows a path, and its degrees of freedom. Tables with few answers tell nothing."""
    seen: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    for tokens in answers:
        for depth, token in enumerate(tokens):
            seen[tuple(tokens[:depth])][token] += 1
    total, freedom = 0.0, 0
    for path, counts in seen.items():
        weights = sampling.distribution(target_logits(path), batch_of(settings), 0)
        expected = weights / weights.sum() * sum(counts.values())
        assert all(weights[token] for token in counts), "a token that the filters had taken out"
        enough = expected >= 5
        if enough.sum() > 1:
            total += sum((counts[token] - expected[token]) ** 2 / expected[token] for token in np.flatnonzero(enough))
            freedom += int(enough.sum()) - 1
    return total, freedom


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_emitted_has_the_distribution_of_the_target(name):
    answers, accepted = emitted(SETTINGS[name])
    total, freedom = chi_squares(answers, SETTINGS[name])
    assert freedom > 15
    assert total < bound(freedom)
    assert accepted > 0.8


def bound(freedom: int) -> float:
    """Five standard deviations above the mean."""
    return freedom + 5 * (2 * freedom) ** 0.5


def draws_from_the_target_after_all(target, draft, tokens, seed, position):
    """Wrong: what was rejected has its whole probability once more."""
    left = int(draft.sum())
    for turn, token in enumerate(tokens):
        if draft[token] and uniform(seed, position, turn + 1) < target[token] / target.sum() * (left / draft[token]):
            return token, turn
        left -= int(draft[token])
    return int(target.cumsum().searchsorted(int(uniform(seed, position) * int(target.sum())), side="right")), None


def forgets_that_a_draft_is_not_drawn_twice(target, draft, tokens, seed, position):
    """Wrong: the drafter's probabilities stay what they were, though a younger sibling was drawn from fewer tokens."""
    rest, slope, mass, left = target, 0.0, float(target.sum()), float(draft.sum())
    for turn, token in enumerate(tokens):
        if uniform(seed, position, turn + 1) < rest[token] / mass * (left / draft[token]):
            return token, turn
        slope += mass / left
        rest = np.maximum(target - (draft * slope).astype(np.int64), 0)
        mass = float(rest.sum())
    return int(rest.cumsum().searchsorted(int(uniform(seed, position) * mass), side="right")), None


def has_one_number_for_all(target, draft, tokens, seed, position, right=rejection._decide):
    """Wrong: what decided on a draft draws the token as well."""
    rejection.uniform = lambda seed, position, draw=0: uniform(seed, position)
    try:
        return right(target, draft, tokens, seed, position)
    finally:
        rejection.uniform = uniform


@pytest.mark.parametrize("rule", [draws_from_the_target_after_all, forgets_that_a_draft_is_not_drawn_twice, has_one_number_for_all])
def test_a_wrong_rule_would_be_told_by_its_distribution(rule, monkeypatch):
    monkeypatch.setattr(rejection, "_decide", rule)
    total, freedom = chi_squares(emitted({})[0], {})
    assert total > 2 * bound(freedom)


# The walk


def test_greedy_requests_emit_what_verification_by_identity_does():
    dice = random.Random(1)
    for turn in range(20):
        logits, _, trees, probabilities = rejection_case(dice, "flat", [6, 0, 9, 1], 9)
        probabilities = probabilities.clamp_min(1e-6)
        batch = batch_of(*({"temperature": 0.0, "seed": turn, "position": row} for row in range(len(logits))))
        best = [-1 if row.isnan().any() or row.max() == -torch.inf else int(row.argmax()) for row in logits]
        assert rejection_sample(logits, batch, trees, probabilities) == walk(trees, best)


def test_a_drafter_that_is_the_target_is_always_right():
    logits = torch.randn(200, 50, generator=torch.Generator().manual_seed(1))
    probabilities = logits.softmax(1)
    drafts = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(2))[:, 0].tolist()
    batch = batch_of(*({"seed": row} for row in range(200)))
    verified = rejection_sample(logits, batch, chains([drafts[1:]], [()]), probabilities.roll(0))
    assert verified.tokens[0][:-1] == drafts[1 : len(verified.tokens[0])]
    assert len(verified.tokens[0]) == 200


def test_a_draft_that_the_drafter_says_it_cannot_make_is_passed_over():
    logits = torch.zeros(3, 4)
    probabilities = torch.tensor([[0.0, 0.5, 0.25, 0.25]] * 3)
    trees = DraftTrees([0, 3], [-1, 0, 0], [0, 0, 1], [()])
    for seed in range(20):
        alone = rejection_sample(logits[:2], rows := batch_of({"seed": seed}, {"seed": seed}), chains([[0]], [()]), probabilities[:2])
        assert alone.rows == [[0]]
        assert alone == rejection_sample(logits[:2], rows, chains([[0]], [()]), torch.zeros(2, 4))
        assert rejection_sample(logits, batch_of(*[{"seed": seed}] * 3), trees, probabilities).rows[0] in ([0], [0, 2])


def test_where_roundings_leave_nothing_the_target_is_drawn_from():
    target, draft = np.array([5, 5]), np.array([1 << 44, 1 << 43])
    # A weight of 5 beside one of 2^44: any rejection leaves nothing of the first token, and little of the second.
    drawn = {rejection._decide(target, draft, [0], seed, 0) for seed in range(200)}
    assert drawn >= {(0, 0), (1, None)}
    # What is left of the one token is less than a whole number.
    assert rejection._decide(np.array([0, 1]), np.array([1, 1 << 44]), [0], 0, 0) == (1, None)


def case(**changed):
    dice = random.Random(2)
    logits, batch, trees, probabilities = rejection_case(dice, "flat", [3, 2], 9)
    return {"logits": logits, "batch": batch, "trees": trees, "probabilities": probabilities} | changed


WRONG = [
    ({"trees": DraftTrees([0, 5], [-1, 0, 0, 1, 0], [0, 1, 2, 3, 1], [()])}, "row 0 has children of the same token"),
    ({"trees": DraftTrees([0, 5], [-1, 0, 0, 1, 0], [0, 1, 2, 9, 3], [()])}, "draft 9 of row 3 is not in the vocabulary of 9"),
    ({"trees": DraftTrees([0, 5], [-1, 0, 0, 1, 0], [0, 1, -1, 5, 3], [()])}, "draft -1 of row 2 is not in the vocabulary of 9"),
    ({"trees": DraftTrees([0, 4], [-1, 0, 0, 1], [0, 1, 2, 3], [()])}, r"logits \[5, 9\] and probabilities \[5, 9\] for 4 rows"),
    ({"trees": DraftTrees([0, 5], [-1, 0, 0, 3, 0], [0, 1, 2, 3, 1], [()])}, "row 3 .* follows row 3"),
    ({"probabilities": torch.zeros(5, 8)}, r"probabilities \[5, 8\] for 5 rows"),
]


@pytest.mark.parametrize(("changed", "words"), WRONG)
def test_what_does_not_fit_is_refused(changed, words):
    with pytest.raises(ValueError, match=words):
        rejection_sample(**case(**changed))


@pytest.mark.parametrize("value", [torch.nan, -0.1, 1.5])
def test_probabilities_that_are_none_are_refused_where_they_would_be_read(value):
    wrong = case()
    read = wrong["trees"].parents[1]
    wrong["probabilities"][read, 3] = value
    with pytest.raises(FloatingPointError, match=f"row {read} of the probabilities"):
        rejection_sample(**wrong)
    childless = next(row for row in range(3) if row not in wrong["trees"].parents[:3])
    fine = case()
    fine["probabilities"][childless, 3] = value
    rejection_sample(**fine)


# Other backends


@pytest.mark.parametrize("shape", ["flat", "peaked", "ties", "infinite"])
def test_the_native_backend_emits_what_the_reference_does(shape):
    cpu = pytest.importorskip("headrace.kernels.cpu", reason="the extension is not built")
    backend, dice = cpu.CpuBackend(1), random.Random(5)
    for sizes in ([4, 0, 7], [1], []):
        logits, batch, trees, probabilities = rejection_case(dice, shape, sizes, 40)
        got = backend.rejection_sample(logits.numpy(), batch, trees, probabilities.numpy())
        assert got == rejection_sample(logits, batch, trees, probabilities)
