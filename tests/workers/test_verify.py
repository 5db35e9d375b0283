"""Drafts in a runner: what is emitted, and the logprobs beside it, where some are right, some are not, and some logits are invalid."""

import math

import numpy as np
import torch

from headrace.engine.ledger.ledger import Row
from headrace.engine.ledger.sequence import Sequence
from headrace.engine.messages.sampling import Sampling
from headrace.kernels.ops import Batch
from headrace.kernels.reference import ReferenceBackend
from headrace.workers.runner import ModelRunner
from tests.workers.test_batch import NoDecoder

PAGE, VOCABULARY = 8, 10


class Told(ReferenceBackend):
    """A model that says of each token which one follows it; what follows an invalid one is not known."""

    def __init__(self, following: dict[int, int], invalid: int) -> None:
        super().__init__()
        self.following, self.invalid = following, invalid

    def new_kv(self, *_) -> list:
        return []

    def compile(self, *_) -> "Told":
        return self

    def run(self, batch: Batch, picks: np.ndarray):
        logits = torch.zeros(len(picks), VOCABULARY)
        for row, token in enumerate(batch.ids[picks].tolist()):
            logits[row, self.following.get(token, 0)] = 5.0
            if token == self.invalid:
                logits[row] = math.nan
        return logits


def stepped(*prompts: list[int], ends: frozenset[int] = frozenset(), invalid: int = -1, lookahead: int = 3):
    """One decoding step of requests that have the prompts: 1 follows 0, 2 follows 1, and so on."""
    runner = ModelRunner(NoDecoder, Told({token: token + 1 for token in range(9)}, invalid), 10, PAGE, "f32")  # type: ignore[arg-type]
    rows = []
    for request, prompt in enumerate(prompts):
        sequence = Sequence(request, prompt, [], Sampling(max_tokens=9, temperature=0.0, logprobs=request % 2 or None), request, ends)
        sequence.pages = [1, 2, 3, 4]
        rows.append(Row(sequence, len(prompt) - 1, 1, True, lookahead))
    return runner.step(rows)


REPEATING, ERRING, PLAIN = [1, 2, 3, 4, 5, 1, 2], [1, 2, 3, 7, 5, 1, 2], [9, 8, 3]


def test_drafts_are_emitted_as_far_as_they_are_what_follows_and_the_token_behind_them():
    outcome = stepped(REPEATING, REPEATING, ERRING, PLAIN)
    assert outcome.drafted == [3, 3, 3, 0]
    assert outcome.tokens == [[3, 4, 5, 6], [3, 4, 5, 6], [3, 4], [4]]
    assert [(one.request, one.index) for one in outcome.logprobs] == [(1, 0), (1, 1), (1, 2), (1, 3), (3, 0)]
    assert len({round(one.logprob, 9) for one in outcome.logprobs}) == 1


def test_an_end_token_ends_what_is_emitted_though_the_drafts_go_on():
    assert stepped(REPEATING, ends=frozenset({4})).tokens == [[3, 4]]


def test_invalid_logits_end_what_is_emitted_of_their_request_alone():
    outcome = stepped(REPEATING, ERRING, [3, 3], invalid=3)
    assert outcome.tokens == [[3], [3], []]
    assert [(one.request, one.index) for one in outcome.logprobs] == [(1, 0)]
