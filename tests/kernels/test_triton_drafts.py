"""Verification of drafts, and moves of keys and values, by the Triton kernels: what the reference gives, row for row and bit for bit."""

import random

import pytest
import torch

pytest.importorskip("triton", reason="the extra headrace[triton] is not installed")

from headrace.kernels.drafts import NO_TOKEN, DraftTrees, chains, walk
from headrace.kernels.reference.rejection import rejection_sample as reference
from headrace.kernels.triton import sampling
from headrace.kernels.triton.drafts import DeviceTrees, verify
from headrace.kernels.triton.rejection import Ready, launch, rejection_sample
from tests.kernels import test_drafts, test_rejection
from tests.kernels.draws import batch_of
from tests.kernels.trees import rejection_case, trees_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_tokens_on_the_device_are_walked_there_as_on_the_host():
    dice = random.Random(4)
    for sizes in ([3, 0, 1, 9], [0], [], [40], [1] * 17, [5, 5, 0, 0, 12]):
        trees = trees_of(dice, sizes, 4)
        tokens = [dice.choice((NO_TOKEN, 0, 1, 2, 3, 3)) for _ in trees.parents]
        assert verify(trees, torch.tensor(tokens, dtype=torch.int64, device=DEVICE)) == walk(trees, tokens) == verify(trees, tokens)


@pytest.mark.parametrize(("parts", "words"), test_drafts.WRONG)
def test_what_are_no_trees_is_refused(parts, words):
    with pytest.raises(ValueError, match=words):
        verify(DraftTrees(*parts), torch.ones(len(parts[1]), dtype=torch.int64, device=DEVICE))


def test_every_row_needs_a_token():
    with pytest.raises(ValueError, match="1 tokens for 2 rows"):
        verify(chains([[3]], [()]), torch.ones(1, dtype=torch.int64, device=DEVICE))


@pytest.mark.parametrize("shape", ["flat", "peaked", "ties", "infinite"])
@pytest.mark.parametrize("vocabulary", [5, 700, 5000])
def test_rejection_emits_what_the_reference_does_whatever_is_asked(shape, vocabulary):
    dice, accepted = random.Random(vocabulary), 0
    for sizes in ([4, 0, 7], [1], [], [20, 1], [0, 8] * 30):
        logits, batch, trees, probabilities = rejection_case(dice, shape, sizes, vocabulary)
        expected = reference(logits, batch, trees, probabilities)
        assert rejection_sample(logits.to(DEVICE), batch, trees, probabilities.to(DEVICE)) == expected
        accepted += sum(len(rows) - 1 for rows in expected.rows if rows)
    assert accepted > 0


def test_filters_that_end_beyond_the_head_leave_what_they_leave_the_reference():
    vocabulary = 4 * sampling.HEAD
    logits = torch.zeros(6, vocabulary)
    probabilities = torch.full((6, vocabulary), 1 / vocabulary)
    trees = chains([[3, 4], [5 * sampling.HEAD // 2, 9]], [(), ()])
    for settings in ({"top_p": 0.7}, {"top_k": 3 * sampling.HEAD}, {"min_p": 0.5, "top_p": 0.999}):
        batch = batch_of(*({"seed": row, **settings} for row in range(6)))
        assert rejection_sample(logits.to(DEVICE), batch, trees, probabilities.to(DEVICE)) == reference(logits, batch, trees, probabilities)


def test_where_roundings_leave_nothing_the_target_is_drawn_from():
    # No logits lead there: the mass is made four times what it is, so that a rejection leaves none of it.
    float32 = lambda *values: torch.tensor(values, dtype=torch.float32, device=DEVICE)  # noqa: E731
    int64 = lambda *values: torch.tensor(values, dtype=torch.int64, device=DEVICE)  # noqa: E731
    trees = DeviceTrees.of(DraftTrees([0, 2], [-1, 0], [0, 1], [()]), torch.device(DEVICE))
    logits, probabilities = float32([0.0, -100.0], [0.0, 0.0]), float32([0.5, 0.5], [0.0, 0.0])
    unit, limit = 1 << 44, torch.iinfo(torch.int64).max
    one, masses, drawn = float32(1.0, 1.0), int64(4 * unit, unit), int64(0, 0)
    ready = Ready(logits, float32(0.0, 0.0), one, int64(limit, limit), masses, probabilities, int64(unit, 0), drawn, drawn)
    launch(ready, trees)
    path, emitted, counts = trees.results()
    assert (path[0], emitted[0], counts[0]) == (0, 0, 1)


@pytest.mark.parametrize(("changed", "words"), test_rejection.WRONG)
def test_what_does_not_fit_is_refused(changed, words):
    with pytest.raises(ValueError, match=words):
        rejection_sample(**test_rejection.case(**changed))


@pytest.mark.parametrize("value", [torch.nan, -0.1, 1.5])
def test_probabilities_that_are_none_are_refused_where_they_would_be_read(value):
    wrong = test_rejection.case()
    read = wrong["trees"].parents[1]
    wrong["probabilities"][read, 3] = value
    with pytest.raises(FloatingPointError, match=f"row {read} of the probabilities"):
        rejection_sample(**wrong)
    fine = test_rejection.case()
    childless = next(row for row in range(3) if row not in fine["trees"].parents[:3])
    expected = reference(**fine)
    fine["probabilities"][childless] = value
    assert rejection_sample(**fine) == expected
