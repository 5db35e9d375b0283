"""Sampling: the right token for a random number, the right distribution, and the same bits whatever stands beside a row."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from headrace.kernels.ops import Sampled
from headrace.kernels.philox import philox4x32, uniform
from headrace.kernels.reference import sampling
from headrace.kernels.reference.sampling import sample, score
from tests.kernels.draws import OFF, batch_of


def sample_one(logits: list[float] | torch.Tensor, **settings) -> Sampled:
    return sample(torch.as_tensor(logits, dtype=torch.float32)[None], batch_of(settings))


def token_of(logits: list[float] | torch.Tensor, **settings) -> int:
    return sample_one(logits, **settings).tokens[0]


# The generator


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, words):
    assert philox4x32(counter, key) == words


@given(st.integers(-(2**63), 2**64 - 1), st.integers(0, 2**40))
def test_a_random_number_is_in_its_interval_and_a_function_of_seed_and_position(seed, position):
    number = uniform(seed, position)
    assert 0 <= number < 1
    assert number == uniform(seed % 2**64, position)
    assert number != uniform(seed ^ 1, position)
    assert number != uniform(seed, position + 1)
    assert number == uniform(seed, position, 0) != uniform(seed, position, 1) != uniform(seed, position, 2)


# Filters and draw, against an oracle that is slow and obvious


def oracle_sets(logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float) -> tuple[list[tuple[int, float]], float]:
    """What is left after the filters as (token, probability), in order; and how near top p and min p came to another answer."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    near = math.inf

    def normalized(tokens: list[int]) -> list[tuple[int, float]]:
        weights = [math.exp((logits[token] - max(logits)) / temperature) for token in tokens]
        return [(token, weight / math.fsum(weights)) for token, weight in zip(tokens, weights, strict=True)]

    left = normalized(order[:top_k] if top_k else order)
    if top_p < 1:
        total, kept = 0.0, []
        for token, probability in left:
            kept.append(token)
            total += probability
            near = min(near, abs(total - top_p))
            if total >= top_p:
                break
        left = normalized(kept)
    if min_p > 0:
        near = min(near, *(abs(probability / left[0][1] - min_p) for _, probability in left))
        left = normalized([token for token, probability in left if probability >= min_p * left[0][1]])
    return left, near


def oracle_draw(left: list[tuple[int, float]], number: float) -> tuple[int, float]:
    """The token, and how near the number came to another."""
    total, near = 0.0, math.inf
    for token, probability in left:
        total += probability
        near = min(near, abs(total - number)) if token != left[-1][0] else near
        if total > number:
            return token, near
    return left[-1][0], near


# Few values, so that many are equal.
LOGITS = st.lists(st.sampled_from([-math.inf, -3.5, -1.0, -0.0, 0.0, 0.25, 1.5, 2.0, 4.0]), min_size=1, max_size=40).filter(
    lambda values: max(values) > -math.inf
)
FILTERS = {
    "temperature": st.sampled_from([0.3, 0.7, 1.0, 1.9]),
    "top_k": st.sampled_from([0, 1, 2, 5, 100]),
    "top_p": st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    "min_p": st.sampled_from([0.0, 0.03, 0.2, 0.99]),
}


@given(LOGITS, st.integers(0, 2**64 - 1), st.fixed_dictionaries({}, optional=FILTERS))
def test_the_token_is_the_one_that_the_written_rules_give(logits, seed, filters):
    used = {name: filters.get(name, OFF[name]) for name in FILTERS}
    left, near_filter = oracle_sets(logits, **used)
    expected, near_number = oracle_draw(left, uniform(seed, 3))
    assume(min(near_filter, near_number) > 1e-6)
    assert token_of(logits, seed=seed, position=3, **used) == expected


@pytest.mark.parametrize("shape", ["flat", "peaked", "ties", "one value"])
@pytest.mark.parametrize(
    "filters", [{}, {"top_p": 0.9}, {"top_p": 0.9999}, {"min_p": 0.001}, {"min_p": 0.2, "top_p": 0.99}, {"top_k": 170, "top_p": 0.95}]
)
def test_ordering_only_the_head_gives_the_same_tokens_as_sorting_the_row(monkeypatch, shape, filters):
    values = torch.randn(600, generator=torch.Generator().manual_seed(1))
    logits = {"flat": values * 0.1, "peaked": values * 6, "ties": (values * 2).round(), "one value": torch.zeros(600)}[shape]
    drawn = []
    for heads in [(600,), (250,), (2, 64)]:
        monkeypatch.setattr(sampling, "HEADS", heads)
        drawn.append([token_of(logits, seed=seed, **filters) for seed in range(12)])
    assert drawn[0] == drawn[1] == drawn[2]
    assert len(set(drawn[0])) > 3 or shape == "peaked"


def test_equal_logits_keep_the_lowest_ids_when_top_k_cuts_between_them():
    assert {token_of([0.0, 1.0, 1.0, 1.0, 1.0], top_k=2, seed=seed) for seed in range(50)} == {1, 2}


def test_the_smallest_and_the_largest_random_number_fall_on_tokens(monkeypatch):
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(2))
    logits[7] = -math.inf
    order = logits.sort(descending=True).indices.tolist()
    monkeypatch.setattr(sampling, "uniform", lambda seed, position: 0.0)
    assert token_of(logits) == order[0]
    monkeypatch.setattr(sampling, "uniform", lambda seed, position: 1 - 2.0**-53)
    assert token_of(logits) == order[-2]


# Greedy


@given(LOGITS)
@example([-0.0, 0.0])
def test_greedy_takes_the_lowest_id_among_the_largest_and_looks_at_no_filter(logits):
    expected = logits.index(max(logits))
    assert token_of(logits, temperature=0.0) == expected
    assert token_of(logits, temperature=0.0, top_k=3, top_p=0.01, min_p=0.5, seed=9) == expected
    assert token_of(logits, top_k=1, seed=9) == expected


def test_a_temperature_that_float32_cannot_tell_from_zero_is_greedy():
    assert token_of([1.0, 3.0, 3.0], temperature=1e-60) == 1
    assert token_of([1.0, 3.0, 2.9], temperature=1e-40) == 1


# Penalties, bias, bans


def test_repetition_divides_positive_and_multiplies_negative_logits_of_seen_tokens():
    # 4 / 2 = 2 < 3 for the prompt's token; -1 * 2 = -2 < -1.5 for the output's.
    assert token_of([4.0, 3.0], temperature=0.0, repetition_penalty=2.0, prompt=[0, 0, 0]) == 1
    assert token_of([-1.0, -1.5], temperature=0.0, repetition_penalty=2.0, output=[0]) == 1
    assert token_of([4.0, 1.9], temperature=0.0, repetition_penalty=2.0, prompt=[0], output=[0]) == 0


def test_presence_counts_a_token_once_frequency_every_time_and_the_prompt_not_at_all():
    assert token_of([3.0, 1.5], temperature=0.0, presence_penalty=1.0, output=[0] * 9) == 0
    assert token_of([3.0, 1.5], temperature=0.0, frequency_penalty=1.0, output=[0] * 2) == 1
    assert token_of([3.0, 1.5], temperature=0.0, frequency_penalty=1.0, output=[0]) == 0
    assert token_of([3.0, 1.5], temperature=0.0, frequency_penalty=9.0, presence_penalty=2.0, prompt=[0]) == 0
    assert token_of([3.0, 1.5], temperature=0.0, presence_penalty=-2.0, output=[1]) == 1


def test_bias_is_added_after_the_penalties():
    # (2 / 2) + 1 = 2 is more than 1.8; (2 + 1) / 2 = 1.5 would not be.
    assert token_of([2.0, 1.8], temperature=0.0, repetition_penalty=2.0, prompt=[0], logit_bias=[(0, 1.0)]) == 0
    assert token_of([2.0, 1.8, 0.0], temperature=0.0, logit_bias=[(0, -100.0), (2, 5.0)]) == 2


def test_a_banned_token_is_never_chosen():
    assert token_of([9.0, 1.0, 8.0], temperature=0.0, banned=(0, 2)) == 1
    assert token_of([9.0, 1.0, 8.0], temperature=0.0, banned=(0,), logit_bias=[(0, 100.0)]) == 2
    assert {token_of([9.0, 1.0, 8.0], banned=(0, 2), seed=seed) for seed in range(20)} == {1}


def test_adjustments_leave_the_logits_of_the_model_alone():
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    kept = logits.clone()
    settings = {"repetition_penalty": 3.0, "presence_penalty": 1.0, "output": [0], "logit_bias": [(1, 4.0)], "banned": (2,), "logprobs": 3}
    adjusted = sample(logits, batch_of(settings | {"temperature": 0.0}))
    assert torch.equal(logits, kept)
    assert adjusted.tokens == [1]
    assert adjusted.logprobs == score(logits, [1], 3)


# Distribution


@pytest.mark.parametrize(
    "filters",
    [{}, {"temperature": 0.6}, {"temperature": 1.7, "top_k": 6}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 8, "top_p": 0.9, "min_p": 0.05}],
)
def test_draws_follow_the_exact_probabilities(filters):
    logits = [1.0, -0.5, 2.0, 0.3, 2.0, -4.0, 1.4, 0.0, 0.9, 1.1]
    draws = 4000
    many = torch.tensor([logits] * draws)
    counts = Counter(sample(many, batch_of(*({"seed": 11, "position": place} | filters for place in range(draws)))).tokens)
    left, _ = oracle_sets(logits, **{name: filters.get(name, OFF[name]) for name in FILTERS})
    assert set(counts) <= {token for token, _ in left}
    square = sum((counts[token] - draws * probability) ** 2 / (draws * probability) for token, probability in left)
    # The mean of chi-square is its degrees of freedom, and its deviation the root of twice that: four deviations are generous.
    free = len(left) - 1
    assert square < free + 4 * math.sqrt(2 * free)


# Log-probabilities


@given(LOGITS, st.integers(0, 5))
def test_logprobs_are_the_log_softmax_of_the_raw_logits_with_ties_by_id(logits, top):
    token = logits.index(max(logits))
    ((logprob, ids, values),) = score(torch.tensor([logits]), [token], top)
    exact = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), 0).tolist()
    order = sorted(range(len(logits)), key=lambda one: (-logits[one], one))[:top]
    assert ids == order
    assert logprob == pytest.approx(exact[token], abs=1e-6)
    assert values == pytest.approx([exact[one] for one in order], abs=1e-6)
    assert sample_one(logits, temperature=0.0, logprobs=top).logprobs == [(logprob, ids, values)]


def test_logprobs_add_up_to_one_over_a_large_vocabulary():
    logits = torch.randn(1, 100_003, generator=torch.Generator().manual_seed(3)) * 4
    ((_, ids, values),) = score(logits, [0], 100_003)
    assert math.fsum(map(math.exp, values)) == pytest.approx(1, abs=1e-6)
    assert sorted(ids) == list(range(100_003))


def test_a_row_that_asks_for_no_report_gets_none():
    both = sample(torch.zeros(2, 4), batch_of({"temperature": 0.0}, {"temperature": 0.0, "logprobs": 0}))
    assert both.logprobs == [None, (pytest.approx(math.log(0.25)), [], [])]


# Row independence


def mixed_rows(count: int) -> list[dict]:
    kinds = [
        {"temperature": 0.0},
        {"temperature": 0.0, "logprobs": 3},
        {"temperature": 0.8, "logprobs": 0},
        {"top_p": 0.9},
        {"top_k": 40, "min_p": 0.01, "logprobs": 5},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5, "prompt": (1, 2, 3), "output": (4, 4, 5)},
        {"temperature": 0.0, "banned": (0, 1), "logit_bias": ((5, 1.5),)},
        {"temperature": 2.0, "top_p": 0.9999, "logprobs": 20},
    ]
    return [kinds[row % len(kinds)] | {"seed": 1000 + row, "position": row * 3} for row in range(count)]


def test_a_row_gives_the_same_bits_alone_and_among_31_others_at_any_thread_count():
    rows, logits = mixed_rows(32), torch.randn(32, 40_001, generator=torch.Generator().manual_seed(4)) * 3
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            together = sample(logits, batch_of(*rows))
            alone = [sample(logits[row : row + 1], batch_of(rows[row])) for row in range(32)]
            odd = sample(logits[::2], batch_of(*rows[::2]))
            assert together.tokens == [one.tokens[0] for one in alone]
            assert together.logprobs == [one.logprobs[0] for one in alone]
            assert (odd.tokens, odd.logprobs) == (together.tokens[::2], together.logprobs[::2])
            results.append((together, score(logits, together.tokens, 4)))
        assert results[0] == results[1]
    finally:
        torch.set_num_threads(before)


def test_a_draw_depends_on_seed_and_position_alone():
    logits = torch.randn(200, generator=torch.Generator().manual_seed(5))
    tokens = [token_of(logits, seed=1, position=place) for place in range(40)]
    assert tokens == [token_of(logits, seed=1, position=place) for place in range(40)]
    assert tokens != [token_of(logits, seed=2, position=place) for place in range(40)]
    assert len(set(tokens)) > 20


# Logits that are no numbers


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {}, {"top_k": 2}, {"banned": (1,)}])
def test_nan_among_the_logits_is_an_error_that_names_the_row(settings):
    logits = torch.zeros(3, 70)
    logits[2, 69] = math.nan
    with pytest.raises(FloatingPointError, match="row 2 of the logits contains NaN"):
        sample(logits, batch_of(*[settings] * 3))
    with pytest.raises(FloatingPointError, match="row 2"):
        score(logits, [0, 0, 0], 1)


def test_a_row_without_any_token_left_is_an_error_that_names_it():
    with pytest.raises(FloatingPointError, match=r"row 0 .* no token"):
        token_of([-math.inf] * 5, temperature=0.0)
    with pytest.raises(FloatingPointError, match=r"row 0 .* no token"):
        token_of([0.0, 1.0], banned=(0, 1))


def test_infinite_logits_share_the_whole_probability():
    logits = [0.0, math.inf, 5.0, math.inf]
    assert {token_of(logits, seed=seed) for seed in range(30)} == {1, 3}
    assert token_of(logits, temperature=0.0) == 1
    ((logprob, ids, values),) = score(torch.tensor([logits]), [3], 3)
    assert logprob == pytest.approx(math.log(0.5))
    assert ids == [1, 3, 2]
    assert values[2] == -math.inf


def test_penalties_beyond_the_range_of_float32_choose_a_token_all_the_same():
    for penalty in (1e-60, 1e60):
        assert token_of(np.array([1.0, 0.0, -1.0]), repetition_penalty=penalty, prompt=[0, 1, 2]) in (0, 1)
