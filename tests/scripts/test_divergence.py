"""Divergences of distributions whose divergence is known, and the file that peers read."""

import io

import numpy as np
import pytest
import torch
from divergence import RANGE_NATS, STEPS, Divergence, pack, unpack, write_head


def test_the_divergence_of_two_coins_is_the_textbook_one() -> None:
    oracle = torch.tensor([[0.75, 0.25]]).double().log()
    found = Divergence()
    found.add(oracle, torch.tensor([[0.5, 0.5]]).log() + 3.0, torch.tensor([1]))
    figures = found.figures()
    assert figures.kl == pytest.approx(0.75 * np.log(1.5) + 0.25 * np.log(0.5))
    assert figures.perplexity == pytest.approx(2)
    assert figures.excess == pytest.approx(np.log(0.25 / 0.5))


def test_same_top_counts_the_rows_that_favour_one_token() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    found = Divergence()
    found.add(torch.log_softmax(logits.double(), -1), logits[[0, 0]], torch.tensor([0, 0]))
    assert found.figures().same_top == 0.5


@pytest.mark.parametrize("vocabulary", [64, 1001])
def test_the_file_keeps_probabilities_within_half_a_step_and_cuts_the_tail(vocabulary: int) -> None:
    logits = np.random.default_rng(0).normal(0, 6, (5, vocabulary)).astype(np.float32)
    truth = torch.log_softmax(torch.from_numpy(logits).double(), -1).numpy()
    packed = pack(logits)
    known = unpack(packed, vocabulary)
    kept = logits > logits.max(-1, keepdims=True) - RANGE_NATS
    assert packed.dtype == np.uint16 and packed.shape[1] % 2 == 0 and not kept.all()
    assert np.abs(known - truth)[kept].max() < 0.51 * RANGE_NATS / STEPS + 1e-5
    assert (known[~kept] > truth[~kept]).all()
    assert (known[~kept] < -RANGE_NATS).all()


def test_the_head_says_how_many_tokens_chunks_and_words_there_are() -> None:
    chunks = np.arange(6, dtype=np.int32).reshape(2, 3)
    out = io.BytesIO()
    write_head(out, chunks, 100)
    read = out.getvalue()
    assert read[:8] == b"_logits_"
    assert np.frombuffer(read[8:], np.int32).tolist() == [3, 100, 2, 0, 1, 2, 3, 4, 5]
