"""Drafts from the text itself."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.engine.ledger.sequence import Sequence
from headrace.engine.messages.sampling import Sampling
from headrace.workers.draft.ngram import NGram


def sequence(tokens: list[int], request: int = 1) -> Sequence:
    return Sequence(request, tokens, [], Sampling(max_tokens=9), 0, frozenset())


@pytest.mark.parametrize(
    ("tokens", "most", "expected"),
    [
        ([1, 2, 3, 4, 5, 1, 2, 3], 2, [4, 5]),
        ([1, 2, 3, 4, 5, 1, 2, 3], 9, [4, 5, 1, 2, 3, 4, 5, 1, 2]),
        ([1, 2, 3, 4, 1, 2, 3, 7, 1, 2, 3], 1, [7]),
        ([9, 2, 3, 4, 8, 2, 3], 1, [4]),
        ([6, 6, 6, 6], 3, [6, 6, 6]),
        ([1, 2, 3, 4], 3, []),
        ([1], 3, []),
    ],
    ids=["what followed", "round and round", "the latest counts", "two tokens", "a run", "nothing", "too short"],
)
def test_what_followed_the_last_tokens_before_is_proposed(tokens, most, expected):
    assert NGram().propose(sequence(tokens), most) == expected


@given(st.lists(st.integers(0, 2), min_size=1, max_size=60), st.lists(st.integers(1, 60), max_size=6))
def test_reading_on_gives_what_reading_at_once_gives(tokens, stops):
    growing, drafter = sequence([]), NGram()
    for stop in sorted(stops):
        growing.tokens = tokens[:stop]
        drafter.propose(growing, 4)
    growing.tokens = tokens
    assert drafter.propose(growing, 4) == NGram().propose(sequence(tokens), 4)


def test_a_text_that_has_become_shorter_is_read_anew():
    drafter, one = NGram(), sequence([1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3])
    assert drafter.propose(one, 1) == [5]
    one.tokens = one.tokens[:7]
    assert drafter.propose(one, 1) == [4]


def test_texts_that_are_over_are_forgotten():
    drafter = NGram()
    for request in range(100):
        drafter.propose(sequence([1, 2, 3], request), 1)
        drafter.keep({request})
    assert len(drafter._indices) < 20
