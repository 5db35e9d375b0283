"""Rows of logits and what is asked of them, for tests of sampling."""

import random

import torch

from headrace.kernels.ops import SamplingBatch

OFF = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "seed": 0,
    "position": 0,
    "logit_bias": (),
    "banned": (),
    "prompt": (),
    "output": (),
    "logprobs": None,
}


def batch_of(*rows: dict) -> SamplingBatch:
    return SamplingBatch(**{name: [(OFF | row)[name] for row in rows] for name in OFF})


def logits_of(shape: str, rows: int, vocabulary: int, seed: int) -> torch.Tensor:
    values = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))
    if shape == "infinite":
        values[torch.rand(values.shape, generator=torch.Generator().manual_seed(seed)) < 0.02] = torch.inf
    return {"flat": values * 0.1, "peaked": values * 6, "ties": (values * 2).round(), "infinite": values}[shape]


def settings(dice: random.Random, vocabulary: int) -> dict:
    tokens = lambda: tuple(dice.randrange(vocabulary) for _ in range(dice.choice((0, 4))))  # noqa: E731
    return {
        "temperature": dice.choice((0, 0.3, 1.0, 1.9)),
        "top_k": dice.choice((0, 1, 5, 3000)),
        "top_p": dice.choice((1.0, 0.5, 0.9999, 0.0)),
        "min_p": dice.choice((0.0, 0.03, 0.2, 1e-6)),
        "repetition_penalty": dice.choice((1.0, 1.3)),
        "presence_penalty": dice.choice((0.0, 0.5)),
        "frequency_penalty": dice.choice((0.0, 0.2)),
        "seed": dice.randrange(-(2**63), 2**64),
        "position": dice.randrange(2**40),
        "logit_bias": dice.choice(((), ((0, 1.5), (2, -3.0), (0, 0.1), (0, 0.1)))),
        "banned": dice.choice(((), (1,))),
        "prompt": tokens(),
        "output": tokens(),
        "logprobs": dice.choice((None, 0, 3, 20)),
    }
