"""Sampling by the Triton kernels: the very tokens and log-probabilities of the reference, from the same logits."""

import random

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the extra headrace[triton] is not installed")

from headrace.kernels.philox import uniform
from headrace.kernels.reference import sampling as reference
from headrace.kernels.triton import sampling
from tests.kernels.draws import batch_of, logits_of, settings

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("shape", ["flat", "peaked", "ties", "infinite"])
@pytest.mark.parametrize("vocabulary", [5, 700, 5000])
def test_rows_get_the_tokens_and_logprobs_of_the_reference_whatever_is_asked(shape, vocabulary):
    dice = random.Random(vocabulary)
    for turn in range(6):
        logits = logits_of(shape, 5, vocabulary, turn)
        batch = batch_of(*(settings(dice, vocabulary) for _ in range(5)))
        assert sampling.sample(logits.to(DEVICE), batch) == reference.sample(logits, batch)


def test_a_draw_beyond_the_head_is_found_in_the_whole_row():
    logits = torch.zeros(3, 4 * sampling.HEAD)
    batch = batch_of(*({"seed": seed, "top_p": 0.99} for seed in range(3)))
    drawn = sampling.sample(logits.to(DEVICE), batch)
    assert drawn == reference.sample(logits, batch)
    assert max(drawn.tokens) >= sampling.HEAD


def test_prompts_are_scored_as_by_the_reference():
    logits = logits_of("ties", 40, 300, 1)
    tokens = [7 * row for row in range(40)]
    assert sampling.score(logits.to(DEVICE), tokens, 5) == reference.score(logits, tokens, 5)


@pytest.mark.parametrize(("value", "words"), [(torch.nan, "row 1 of the logits contains NaN"), (-torch.inf, "row 1 .* leaves no token")])
def test_a_row_that_is_invalid_is_named(value, words):
    logits = torch.zeros(3, 50)
    logits[1] = value
    with pytest.raises(FloatingPointError, match=words):
        sampling.sample(logits.to(DEVICE), batch_of({}, {"temperature": 0}, {}))
    with pytest.raises(FloatingPointError, match=words):
        sampling.score(logits.to(DEVICE), [1, 1, 1], 2)


def test_random_numbers_are_those_of_philox():
    seeds, positions = [0, 1, -1, 2**64 - 1, 12345678901234567890], [0, 2**33 + 5, 7, 2**40, 1]
    batch = batch_of(*({"seed": seed, "position": position} for seed, position in zip(seeds, positions, strict=True)))
    numbers = sampling.Draws.of(batch, range(5), 10, torch.device(DEVICE)).numbers.tolist()
    assert numbers == [int(uniform(*each) * 2**53) for each in zip(seeds, positions, strict=True)]
    draws = [0, 1, 2, 2**32 - 1, 7]
    arguments = (torch.tensor(values, device=DEVICE) for values in ([0, 1, -1, 5, 6], positions, draws))
    numbers = sampling.random_numbers(*arguments).tolist()
    assert numbers == [int(uniform(*each) * 2**53) for each in zip([0, 1, -1, 5, 6], positions, draws, strict=True)]


def test_a_share_of_a_mass_is_exact():
    dice = random.Random(3)
    pairs = [(dice.randrange(2**53), dice.randrange(1, 2**63 - 1) >> dice.randrange(60)) for _ in range(500)] + [(2**53 - 1, 2**63 - 1)]
    numbers, masses = (torch.from_numpy(np.array(values, np.int64)) for values in zip(*pairs, strict=True))
    assert sampling._share(numbers, masses).tolist() == [number * mass >> 53 for number, mass in pairs]
