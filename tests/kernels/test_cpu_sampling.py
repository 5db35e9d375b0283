"""Native sampling: the reference's tokens and log-probabilities to the last bit, for every instruction set and number of threads."""

import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.kernels.ops import Sampled, SamplingBatch
from headrace.kernels.philox import uniform
from headrace.kernels.reference import ReferenceBackend
from tests.kernels.test_sampling import batch_of, mixed_rows

cpu = pytest.importorskip("headrace.kernels.cpu", reason="the extension is not built")

REFERENCE = ReferenceBackend()
BACKENDS = [cpu.CpuBackend(threads, isa) for isa in cpu.INSTRUCTION_SETS for threads in (1, 2)]


def expected_of(logits: np.ndarray, batch: SamplingBatch) -> Sampled | str:
    """What the reference says; text where it refuses."""
    return answer(lambda: REFERENCE.sample(torch.from_numpy(logits), batch))


def answer(call):
    try:
        return call()
    except FloatingPointError as error:
        return str(error)


def assert_all_give_what_the_reference_gives(logits: np.ndarray, *rows: dict) -> None:
    """repr tells 0.0 from -0.0, and NaN is NaN."""
    batch = batch_of(*rows)
    expected = repr(expected_of(logits, batch))
    for backend in BACKENDS:
        assert repr(answer(lambda backend=backend: backend.sample(logits, batch))) == expected, (backend.isa, backend.threads)


# Rows of every kind

SIZES = (1, 2, 3, 7, 8, 9, 33, 255, 256, 257, 300, 511, 513, 1000, 1027, 4099)


def drawn_logits(dice: random.Random, size: int) -> np.ndarray:
    values = np.random.default_rng(dice.getrandbits(32)).standard_normal(size).astype(np.float32)
    kind = dice.randrange(10)
    if kind == 0:
        values *= np.float32(0.1)
    elif kind == 1:
        values *= 6
    elif kind == 2:
        values = np.round(values * 2)
    elif kind == 3:
        values[:] = dice.choice([0, -3, 5])
    elif kind == 4:  # the values are apart by factors, up to the range of floats
        values = np.exp(np.clip(values * 30, -100, 88)).astype(np.float32) * dice.choice([1, -1])
    elif kind == 5:
        values[dice.sample(range(size), dice.choice([size // 2, size - 1]))] = -math.inf
    elif kind == 6:
        values[dice.sample(range(size), min(size, 3))] = math.inf
    elif kind == 7:  # neighbours among the smallest floats there are
        values *= np.float32(1e-44)
    elif kind == 8 and dice.random() < 0.3:
        values[dice.randrange(size)] = math.nan
    return values


def drawn_row(dice: random.Random, size: int) -> dict:
    def ids(most: int) -> list[int]:
        return [dice.randrange(size) for _ in range(dice.randrange(most))]

    def sometimes(*values, otherwise, chance: float = 0.4):
        return dice.choice(values) if dice.random() < chance else otherwise

    return {
        "seed": dice.choice([dice.getrandbits(64), -dice.getrandbits(63), dice.getrandbits(20)]),
        "position": dice.choice([0, 1, dice.getrandbits(12), dice.getrandbits(40)]),
        "temperature": dice.choice([0, 0.0, 1.0, 1, 0.3, 0.7, 1.9, 1e-60, 1e-40, 1e-3, 50.0, 1e38]),
        "top_k": sometimes(1, 2, 5, 40, 256, 257, size, size + 1, max(1, size - 1), max(1, size // 2), otherwise=0),
        "top_p": sometimes(0.0, 0.1, 0.5, 0.9, 0.99, 0.9999, 1 - 2**-53, otherwise=1.0),
        "min_p": sometimes(0.03, 0.2, 0.99, 1.0, 1e-6, 1e-30, otherwise=0.0),
        "repetition_penalty": sometimes(1.1, 0.8, 2.0, 1e-60, 1e60, otherwise=1.0, chance=0.25),
        "presence_penalty": sometimes(0.5, -2.0, 2.0, otherwise=0.0, chance=0.25),
        "frequency_penalty": sometimes(0.1, -0.3, 2.0, otherwise=0.0, chance=0.25),
        "prompt": ids(30),
        "output": ids(30) + ids(3) * 3,
        "logit_bias": [(token, dice.choice([-100.0, 100.0, 0.5, 1e30])) for token in sometimes(ids(5), otherwise=(), chance=0.2)],
        "banned": tuple(sometimes(ids(5), otherwise=(), chance=0.2)),
        "logprobs": sometimes(0, 1, 5, 20, size, size // 2, otherwise=None),
    }


@pytest.mark.parametrize("start", range(0, 400, 100))
@pytest.mark.filterwarnings("ignore:overflow")
def test_rows_of_every_kind_get_the_tokens_and_logprobs_of_the_reference(start):
    for number in range(start, start + 100):
        dice = random.Random(number)
        size, count = dice.choice(SIZES), dice.choice([1, 1, 2, 5])
        logits = np.stack([drawn_logits(dice, size) for _ in range(count)])
        assert_all_give_what_the_reference_gives(logits, *[drawn_row(dice, size) for _ in range(count)])
        tokens, top = [dice.randrange(size) for _ in range(count)], dice.choice([0, 3, 20])
        expected = answer(lambda logits=logits, tokens=tokens, top=top: REFERENCE.score(torch.from_numpy(logits), tokens, top))
        for backend in BACKENDS:
            got = answer(lambda backend=backend, logits=logits, tokens=tokens, top=top: backend.score(logits, tokens, top))
            assert repr(got) == repr(expected)


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 7.0])
def test_large_vocabularies_get_the_tokens_of_the_reference(scale):
    logits = np.random.default_rng(5).standard_normal((8, 151_937), np.float32) * np.float32(scale)
    kinds = [{}, {"top_p": 0.95}, {"top_k": 50}, {"top_k": 20_000}, {"min_p": 0.02}, {"top_k": 900, "top_p": 0.9, "min_p": 1e-4}]
    kinds += [{"temperature": 0.0}, {"temperature": 0.1, "logprobs": 20}]
    assert_all_give_what_the_reference_gives(logits, *[kind | {"seed": seed} for seed, kind in enumerate(kinds)])


def test_logits_that_intervals_cannot_tell_apart_are_put_in_order_all_the_same():
    """A few far off, the rest so near to each other that they fall into one interval again and again."""
    near = np.float32(1) + np.arange(3000, dtype=np.float32) * np.finfo(np.float32).eps
    smallest = np.arange(3000, dtype=np.float32) * np.float32(1e-45)
    halves = np.float32(2) ** -np.arange(3000, dtype=np.float32).clip(max=140)
    for values in (near, smallest, halves):
        logits = np.tile(np.concatenate((values[::2], values[1::2])), (20, 1))
        logits[:, 7] -= 20
        assert_all_give_what_the_reference_gives(logits, *[{"seed": seed, "top_k": 2000 * (seed % 2)} for seed in range(20)])


# Greedy, and the scan for the largest logit


@pytest.mark.parametrize("size", [1, 7, 8, 31, 32, 33, 71])
def test_the_largest_logit_is_found_wherever_it_stands_and_so_is_a_single_nan(size):
    logits = np.full((size, size), -2, np.float32)
    np.fill_diagonal(logits, 3)
    bad = logits.copy()
    np.fill_diagonal(bad, math.nan)
    for backend in BACKENDS:
        assert backend.sample(logits, batch_of(*[{"temperature": 0.0}] * size)).tokens == list(range(size))
        for row in range(size):
            with pytest.raises(FloatingPointError, match="row 0 of the logits contains NaN"):
                backend.sample(bad[row : row + 1], batch_of({"temperature": 0.0}))


def test_equal_largest_logits_give_the_lowest_id_whatever_the_sign_of_zero():
    for backend in BACKENDS:
        assert backend.sample(np.float32([[-1, -0.0, 0.0]]), batch_of({"temperature": 0.0})).tokens == [1]
        assert backend.sample(np.float32([[2, 5, 5, 5]]), batch_of({"top_k": 1, "seed": 4})).tokens == [1]


def test_the_most_likely_are_found_in_rising_falling_and_equal_logits():
    rising = np.arange(5000, dtype=np.float32) // 3
    logits = np.stack([rising, rising[::-1], np.zeros(5000, np.float32), np.where(rising > 1000, -np.inf, rising)])
    for top in (1, 2, 19, 20, 300, 2600, 5000):
        for backend in BACKENDS:
            for values, (_, ids, _) in zip(logits, backend.score(logits, [0] * 4, top), strict=True):
                assert ids == np.lexsort((np.arange(5000), -values))[:top].tolist()


# Numbers and distribution


@given(st.integers(-(2**63), 2**64 - 1), st.integers(0, 2**40))
@settings(max_examples=300)
def test_random_numbers_are_those_of_philox_to_the_last_bit(seed, position):
    assert cpu._native.number(seed, position) == uniform(seed, position)


def test_equal_logits_are_drawn_by_the_number_itself():
    size, seeds = 1 << 16, range(50)
    logits = np.zeros((len(seeds), size), np.float32)
    for backend in BACKENDS:
        tokens = backend.sample(logits, batch_of(*({"seed": seed, "position": 9} for seed in seeds))).tokens
        assert tokens == [int(uniform(seed, 9) * size) for seed in seeds]


@pytest.mark.parametrize("filters", [{}, {"temperature": 0.5}, {"top_k": 300}, {"top_p": 0.7}, {"min_p": 0.2}])
def test_draws_follow_the_exact_probabilities(filters):
    size, draws = 400, 40_000
    values = np.random.default_rng(8).standard_normal(size).astype(np.float32)
    order = np.argsort(-values, kind="stable")
    probabilities = np.exp(values[order].astype(np.float64) / filters.get("temperature", 1))
    probabilities[filters.get("top_k", size) :] = 0
    probabilities /= probabilities.sum()
    probabilities[np.searchsorted(probabilities.cumsum(), filters.get("top_p", 2)) + 1 :] = 0
    probabilities[probabilities < filters.get("min_p", 0) * probabilities[0]] = 0
    probabilities /= probabilities.sum()
    counts = Counter()
    for start in range(0, draws, 2000):
        rows = ({"seed": 3, "position": start + row} | filters for row in range(2000))
        counts.update(BACKENDS[0].sample(np.tile(values, (2000, 1)), batch_of(*rows)).tokens)
    expected, seen = probabilities * draws, np.array([counts[token] for token in order])
    assert seen[expected == 0].sum() == 0
    kept = expected > 0
    square = ((seen[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    free = kept.sum() - 1
    assert abs(square - free) < 4 * math.sqrt(2 * free)


@pytest.mark.parametrize("size", [1, 5, 1000, 100_003])
def test_logprobs_are_the_log_softmax_of_the_raw_logits(size):
    logits = np.random.default_rng(size).standard_normal((2, size), np.float32) * 4
    exact = logits.astype(np.float64)
    exact -= exact.max(1, keepdims=True)
    exact -= np.log(np.exp(exact).sum(1, keepdims=True))
    rows = [
        {"logprobs": size, "temperature": 2.0, "banned": (0,) if size > 1 else ()},
        {"logprobs": 3, "presence_penalty": 1.0, "output": (0,)},
    ]
    for backend in BACKENDS:
        sampled = backend.sample(logits, batch_of(*rows))
        for row, (logprob, ids, values) in enumerate(sampled.logprobs):
            assert logprob == pytest.approx(exact[row, sampled.tokens[row]], abs=1e-5)
            np.testing.assert_allclose(values, exact[row, ids], rtol=0, atol=1e-5)
        assert sampled.logprobs == [backend.score(logits, sampled.tokens, top)[row] for row, top in enumerate((size, 3))]


# A row on its own


def test_a_row_gives_the_same_bits_alone_and_among_31_others_on_any_engine():
    rows = mixed_rows(32)
    logits = np.random.default_rng(4).standard_normal((32, 40_001), np.float32) * 3
    whole = BACKENDS[0].sample(logits, batch_of(*rows))
    for backend in [*BACKENDS, cpu.CpuBackend(3)]:
        assert backend.sample(logits, batch_of(*rows)) == whole
        alone = [backend.sample(logits[row : row + 1], batch_of(rows[row])) for row in range(32)]
        assert [one.tokens[0] for one in alone] == whole.tokens
        assert [one.logprobs[0] for one in alone] == whole.logprobs
        every_third = backend.sample(np.ascontiguousarray(logits[::-3]), batch_of(*rows[::-3]))
        assert every_third == Sampled(whole.tokens[::-3], whole.logprobs[::-3])


def test_penalties_of_one_row_leave_no_trace_in_the_next_or_in_the_logits():
    logits = np.tile(np.float32([3, 2, 1]), (3, 1))
    kept = logits.copy()
    penalized = {"temperature": 0.0, "repetition_penalty": 4.0, "frequency_penalty": 1.5, "prompt": (0,), "output": (0, 0)}
    for backend in BACKENDS:
        assert backend.sample(logits, batch_of(penalized, {"temperature": 0.0}, penalized)).tokens == [1, 0, 1]
        assert (logits == kept).all()


# What is refused


def test_the_first_row_without_an_answer_is_named():
    logits = np.zeros((4, 70), np.float32)
    logits[2, 69] = math.nan
    logits[3] = -math.inf
    for backend in BACKENDS:
        for settings_ in ({"temperature": 0.0}, {}, {"top_k": 2}, {"banned": (1,)}):
            with pytest.raises(FloatingPointError, match="row 2 of the logits contains NaN"):
                backend.sample(logits, batch_of(*[settings_] * 4))
        with pytest.raises(FloatingPointError, match="row 2 of the logits contains NaN"):
            backend.score(logits, [0] * 4, 1)
        with pytest.raises(FloatingPointError, match="row 1 of the logits leaves no token"):
            backend.sample(logits[:2], batch_of({}, {"banned": tuple(range(70))}))
        with pytest.raises(FloatingPointError, match="row 0 of the logits leaves no token"):
            backend.score(logits[3:], [0], 0)


@pytest.mark.parametrize(
    ("column", "value"),
    [("banned", (5,)), ("prompt", (-1,)), ("output", (0, 99)), ("logit_bias", ((5, 1.0),)), ("logit_bias", ((-2, 1.0),))],
)
def test_an_id_that_is_not_in_the_vocabulary_is_refused_by_name(column, value):
    with pytest.raises(ValueError, match=f"{column} holds .*0 … 4"):
        BACKENDS[0].sample(np.zeros((1, 5), np.float32), batch_of({"repetition_penalty": 2.0, column: value}))


def test_columns_and_logits_that_do_not_fit_are_refused():
    logits = np.zeros((2, 5), np.float32)
    with pytest.raises(ValueError, match="temperature has 1 entries for 2 rows"):
        BACKENDS[0].sample(logits, batch_of({}))
    with pytest.raises(ValueError, match="tokens has 3 entries for 2 rows"):
        BACKENDS[0].score(logits, [0, 1, 2], 0)
    with pytest.raises(ValueError, match="tokens holds 5"):
        BACKENDS[0].score(logits, [0, 5], 0)
    for wrong in (logits.astype(np.float64), logits[0], np.zeros((2, 0), np.float32)):
        with pytest.raises(ValueError, match="float32 matrix"):
            BACKENDS[0].sample(wrong, batch_of({}, {}))
    assert BACKENDS[0].sample(logits[:0], batch_of()) == Sampled([], [])
