"""Sampling and scoring in native code, on the engine's threads: the columns of a `SamplingBatch` go there as they are.

The rules are those of `kernels.reference.sampling`, and so are the numbers, to the last bit. Choosing a token takes no other library
than numpy, whose arrays the logits come in.
"""

from collections.abc import Sequence

import numpy as np

from headrace.kernels.cpu import _native
from headrace.kernels.ops import Sampled, SamplingBatch


def sample(engine: _native.Engine, logits: np.ndarray, batch: SamplingBatch) -> Sampled:
    """See `Backend.sample`. ValueError for ids that are not in the vocabulary, and where a column is not as long as there are rows."""
    tokens, logprobs = engine.sample(
        logits,
        batch.temperature,
        batch.top_k,
        batch.top_p,
        batch.min_p,
        batch.repetition_penalty,
        batch.presence_penalty,
        batch.frequency_penalty,
        batch.seed,
        batch.position,
        batch.logit_bias,
        batch.banned,
        batch.prompt,
        batch.output,
        batch.logprobs,
    )
    return Sampled(tokens, logprobs)


def score(engine: _native.Engine, logits: np.ndarray, tokens: Sequence[int], top: int) -> list[tuple[float, list[int], list[float]]]:
    """See `Backend.score`. ValueError as `sample`."""
    return engine.score(logits, tokens, top)
