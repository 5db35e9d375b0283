"""The flat arrays of a step: every token with its id, its place and its slot; and sampling parameters that are kept from step to step."""

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.engine.ledger.ledger import Row
from headrace.engine.ledger.sequence import Sequence
from headrace.engine.messages.sampling import Sampling
from headrace.kernels.ops import Sampled, SamplingBatch
from headrace.workers.batch import build_batch
from headrace.workers.runner import ModelRunner, sampling_batch

PAGE = 8


def row(request: int, start: int, length: int, emits: bool, pages: list[int]) -> Row:
    sequence = Sequence(request, [1000 * request + place for place in range(start + length)], [], Sampling(max_tokens=9), 0, frozenset())
    sequence.pages = pages
    return Row(sequence, start, length, emits)


@st.composite
def rows(draw) -> list[Row]:
    one = st.tuples(st.integers(0, 40), st.integers(1, 20), st.booleans(), st.integers(0, 2))
    made, next_page = [], 5
    for request, (start, length, emits, spare) in enumerate(draw(st.lists(one, min_size=1, max_size=6))):
        count = -(-(start + length) // PAGE) + spare
        made.append(row(request, start, length, emits, list(range(next_page + count, next_page, -1))))
        next_page += count
    return made


@given(rows(), st.randoms(use_true_random=False))
def test_every_token_and_every_draft_has_its_id_place_and_slot(rows, dice):
    room = [len(row.sequence.pages) * PAGE - row.start - row.length if row.emits else 0 for row in rows]
    drafts = [[9000 + place for place in range(dice.randint(0, min(4, most)))] for most in room]
    flat = build_batch(rows, PAGE, drafts if any(drafts) else None)
    batch = flat.batch
    for field in fields(batch):
        array = getattr(batch, field.name)
        assert array is None or (array.dtype == np.int32 and array.flags.c_contiguous), field.name
    at = 0
    for index, row in enumerate(rows):
        sequence = row.sequence
        assert flat.starts[index] == at == batch.query_start[index]
        assert batch.pages[index].tolist() == sequence.pages + [0] * (batch.pages.shape[1] - len(sequence.pages))
        end = row.start + row.length
        for place in range(row.start, end + len(drafts[index])):
            assert batch.ids[at] == (sequence.tokens[place] if place < end else drafts[index][place - end])
            assert batch.positions[at] == place
            assert batch.slots[at] == sequence.pages[place // PAGE] * PAGE + place % PAGE
            at += 1
    assert len(flat.starts) == len(rows)
    assert batch.query_start[-1] == at == len(batch.ids) == len(batch.positions) == len(batch.slots)
    assert flat.picks.tolist() == [
        int(batch.query_start[index + 1]) - 1 - behind
        for index, row in enumerate(rows)
        if row.emits
        for behind in range(len(drafts[index]), -1, -1)
    ]


class Recording:
    """A backend whose model and sampler do nothing but remember what they were asked."""

    step_tokens = 256

    def __init__(self) -> None:
        self.asked: list[dict] = []

    def new_kv(self, *_) -> list:
        return []

    def compile(self, *_) -> "Recording":
        return self

    def run(self, *_) -> np.ndarray:
        return np.zeros((1, 1))

    def sample(self, logits: np.ndarray, batch: SamplingBatch) -> Sampled:
        self.asked.append({field.name: [*getattr(batch, field.name)] for field in fields(batch)})
        return Sampled([7] * len(batch.position), [None] * len(batch.position))


class NoDecoder:
    layers = ()
    heads = None


@pytest.mark.parametrize(
    "parameters",
    [
        [{}, {"temperature": 0.0, "logprobs": 2}],
        [{"frequency_penalty": 0.5}, {}],
        [{"repetition_penalty": 1.5}],
        [{"min_tokens": 3, "stop_token_ids": [4]}, {"logit_bias": [(3, 1.0)]}],
    ],
)
def test_what_the_sampler_is_asked_is_the_same_as_if_it_were_written_anew_in_every_step(parameters):
    backend = Recording()
    runner = ModelRunner(NoDecoder, backend, 10, PAGE, "f16")  # type: ignore[arg-type]
    sequences = [
        Sequence(request, [1, 2, 3], [], Sampling(max_tokens=20, **more), request, frozenset({4}))
        for request, more in enumerate(parameters)
    ]
    for sequence in sequences:
        sequence.pages = [1, 2, 3, 4]
    asked = []
    for running in [sequences] * 6 + [sequences[:1]] * 2 + [sequences] * 3:
        asked.append(sampling_batch(running))
        runner.step([Row(sequence, len(sequence.tokens) - 1, 1, True) for sequence in running])
        expected = {field.name: [*getattr(asked[-1], field.name)] for field in fields(SamplingBatch)}
        assert backend.asked[-1] == expected
        for sequence in running:
            sequence.tokens.append(7)
