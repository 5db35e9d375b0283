"""The runner with a model: weights, KV pages and kernels of one rank, and what a step makes of them.

    rows, drafts ─▶ Batch ─▶ Program.run ─▶ hidden ─┬─▶ rows that emit, drafts ─▶ logits ─▶ sample ─▶ verify ─▶ tokens
                                                    └─▶ rows of scored prompts ─▶ logits ─▶ score ──▶ prompt logprobs

A draft is right if it is the token that is sampled in its place anyway. Sampling is a function of seed and position, so what is emitted
is the same with drafts and without, greedy or not.

One process a rank.
"""

import math
import time
from itertools import repeat

import numpy as np

from headrace.engine.errors import UserError
from headrace.engine.ledger.ledger import Row
from headrace.engine.ledger.sequence import Sequence
from headrace.engine.messages.sampling import Sampling
from headrace.engine.messages.steps import ToWorker
from headrace.engine.messages.tokens import PromptLogprobs, TokenLogprobs
from headrace.engine.process import Process, Role
from headrace.engine.sizes import parse_size
from headrace.kernels.drafts import NO_TOKEN, chains
from headrace.kernels.ops import Array, Backend, SamplingBatch
from headrace.kernels.select import KernelsUnavailable, load, make_backend
from headrace.workers.batch import build_batch
from headrace.workers.cache import weights_folder, weights_version
from headrace.workers.draft.ngram import NGram
from headrace.workers.loader import open_checkpoint
from headrace.workers.model.decoder import Decoder, head_shape
from headrace.workers.model.families import describe
from headrace.workers.worker import Outcome, Worker, rank_of

Scores = tuple[float, list[int], list[float]]
"""See `headrace.kernels.ops.Sampled`."""

SCORED_ROWS = 64
"""Prompt positions whose logits are in memory at once."""


class ModelRunner:
    """Computes rows with a decoder. Memory for pages is claimed from the system only when they are first written."""

    def __init__(self, decoder: Decoder, backend: Backend, pages: int, page_size: int, kv_dtype: str) -> None:
        self.pages = pages
        self.page_size = page_size
        self.step_tokens = backend.step_tokens
        self._backend = backend
        kv = backend.new_kv(len(decoder.layers), pages, page_size, decoder.heads, kv_dtype)
        self._program = backend.compile(decoder, kv)
        self._drafter = NGram()
        self._sampled: tuple[list[Sequence], SamplingBatch] | None = None
        """What was sampled last, if the same sequences need no more than new positions."""

    def step(self, rows: list[Row]) -> Outcome:
        """See `Runner.step`."""
        begun = time.perf_counter_ns()
        drafts = [self._drafter.propose(row.sequence, row.lookahead) if row.lookahead else [] for row in rows] if _may_draft(rows) else None
        flat = build_batch(rows, self.page_size, drafts)
        prepared = time.perf_counter_ns()
        logits = self._program.run(flat.batch, flat.picks)
        forwarded = time.perf_counter_ns()
        outcome = Outcome([])
        if drafts is not None:
            self._choose_and_verify(logits, rows, drafts, outcome)
        elif len(flat.picks):
            self._choose(logits, rows, outcome)
        for start, row in zip(flat.starts, rows, strict=True):
            if row.sequence.sampling.prompt_logprobs is not None:
                self._score_prompt(start, row, outcome)
        outcome.prepare_ns = prepared - begun
        outcome.forward_ns = forwarded - prepared
        outcome.sample_ns = time.perf_counter_ns() - forwarded
        return outcome

    def warm_up(self) -> None:
        """Run a few tokens through page 0, so that the first request does not pay for what is set up on first use."""
        for length in (1, 2 * self.page_size):
            sequence = Sequence(0, [0] * length, [], Sampling(max_tokens=1, temperature=0.0), 0, frozenset())
            sequence.pages = [min(page, self.pages - 1) for page in range(2)]
            self.step([Row(sequence, 0, length, emits=True)])

    def _choose(self, logits: Array, rows: list[Row], outcome: Outcome) -> None:
        """Sample every row that emits."""
        sequences = [row.sequence for row in rows if row.emits]
        tokens, scores = self._sample(logits, sequences, None)
        outcome.tokens = [[] if token == NO_TOKEN else [token] for token in tokens]
        for sequence, one in zip(sequences, scores, strict=True):
            if one is not None:
                outcome.logprobs.append(_scored(sequence, sequence.emitted, one))

    def _choose_and_verify(self, logits: Array, rows: list[Row], drafts: list[list[int]], outcome: Outcome) -> None:
        """Sample every row that emits, and behind it each of its drafts for as long as they are what was sampled before them."""
        emitting = [(row.sequence, draft) for row, draft in zip(rows, drafts, strict=True) if row.emits]
        outcome.drafted = [len(draft) for _, draft in emitting]
        self._drafter.keep({row.sequence.request for row in rows})
        sequences = [sequence for sequence, draft in emitting for _ in range(len(draft) + 1)]
        before = [draft[:count] for _, draft in emitting for count in range(len(draft) + 1)]
        tokens, scores = self._sample(logits, sequences, before)
        trees = chains([draft for _, draft in emitting], [sequence.end_tokens for sequence, _ in emitting])
        outcome.tokens = self._backend.verify(trees, tokens).tokens
        if not any(scores):
            return
        for (sequence, _), start, emitted in zip(emitting, trees.starts, outcome.tokens, strict=False):
            for index, one in enumerate(scores[start : start + len(emitted)], sequence.emitted):
                if one is not None:
                    outcome.logprobs.append(_scored(sequence, index, one))

    def _sample(self, logits: Array, sequences: list[Sequence], before: list[list[int]] | None) -> tuple[list[int], list[Scores | None]]:
        """A token and its scores for each row of logits; NO_TOKEN where they are invalid. A row's token comes after its sequence's own, and
        after the drafts `before` it, taken for emitted."""
        try:
            sampled = self._backend.sample(logits, self._sampling_batch(sequences, before))
        except FloatingPointError:
            if len(sequences) == 1:
                return [NO_TOKEN], [None]
            tokens, scores = [], []
            for row, sequence in enumerate(sequences):
                token, score = self._sample(logits[row : row + 1], [sequence], before and before[row : row + 1])
                tokens += token
                scores += score
            return tokens, scores
        return sampled.tokens, sampled.logprobs

    def _sampling_batch(self, sequences: list[Sequence], before: list[list[int]] | None) -> SamplingBatch:
        """`sampling_batch`, which from one step to the next is mostly the same."""
        if self._sampled is not None and self._sampled[0] == sequences:
            batch = self._sampled[1]
            batch.position[:] = _positions(sequences, before)
            return batch
        batch = sampling_batch(sequences, before)
        steady = not any(batch.banned) and not any(map(_penalizes, sequences))
        self._sampled = (sequences, batch) if steady else None
        return batch

    def _score_prompt(self, at: int, row: Row, outcome: Outcome) -> None:
        """Score the prompt tokens that the positions of `row` predict."""
        sequence = row.sequence
        stop = min(row.start + row.length, sequence.prompt - 1)
        for first in range(row.start, stop, SCORED_ROWS):
            count = min(SCORED_ROWS, stop - first)
            offset = at + first - row.start
            logits = self._program.logits(np.arange(offset, offset + count, dtype=np.int32))
            following = sequence.tokens[first + 1 : first + 1 + count]
            try:
                scores = self._backend.score(logits, following, sequence.sampling.prompt_logprobs or 0)
            except FloatingPointError:
                scores = [(-math.inf, [], [])] * count
            outcome.prompt_logprobs.append(
                PromptLogprobs(
                    sequence.request,
                    first + 1,
                    [logprob for logprob, _, _ in scores],
                    [tuple(top) for _, top, _ in scores],
                    [tuple(values) for _, _, values in scores],
                )
            )


def sampling_batch(sequences: list[Sequence], before: list[list[int]] | None = None) -> SamplingBatch:
    """The sampling parameters of rows of logits, as columns; see `ModelRunner._sample`."""
    parameters = [sequence.sampling for sequence in sequences]
    position = _positions(sequences, before)
    return SamplingBatch(
        temperature=[one.temperature for one in parameters],
        top_k=[one.top_k for one in parameters],
        top_p=[one.top_p for one in parameters],
        min_p=[one.min_p for one in parameters],
        repetition_penalty=[one.repetition_penalty for one in parameters],
        presence_penalty=[one.presence_penalty for one in parameters],
        frequency_penalty=[one.frequency_penalty for one in parameters],
        seed=[sequence.seed for sequence in sequences],
        position=position,
        logit_bias=[one.logit_bias for one in parameters],
        banned=[
            tuple(sequence.end_tokens) if place < sequence.sampling.min_tokens else ()
            for sequence, place in zip(sequences, position, strict=True)
        ],
        prompt=[sequence.tokens[: sequence.prompt] if sequence.sampling.repetition_penalty != 1 else () for sequence in sequences],
        output=[
            [*sequence.tokens[sequence.prompt :], *drafted] if _penalizes(sequence) else ()
            for sequence, drafted in zip(sequences, before or repeat(()), strict=False)
        ],
        logprobs=[one.logprobs for one in parameters],
    )


def _positions(sequences: list[Sequence], before: list[list[int]] | None) -> list[int]:
    """Which of its request's tokens each row is to give."""
    if before is None:
        return [sequence.emitted for sequence in sequences]
    return [sequence.emitted + len(drafted) for sequence, drafted in zip(sequences, before, strict=True)]


def _scored(sequence: Sequence, index: int, scores: Scores) -> TokenLogprobs:
    logprob, top, top_logprobs = scores
    return TokenLogprobs(sequence.request, index, logprob, tuple(top), tuple(top_logprobs))


def _may_draft(rows: list[Row]) -> bool:
    return any(row.lookahead for row in rows)


def _penalizes(sequence: Sequence) -> bool:
    sampling = sequence.sampling
    return sampling.repetition_penalty != 1 or sampling.presence_penalty != 0 or sampling.frequency_penalty != 0


def page_count(page_bytes: int, room: int, asked: str | None) -> int:
    """How many KV pages fit into so many bytes, which the user `asked` for or not. `UserError` when not even one does."""
    pages = room // page_bytes
    if pages < 1:
        raise UserError(f"--kv-memory {asked or room} holds no page of {page_bytes} bytes: give more, or a smaller --page-size")
    return pages


async def build(process: Process) -> Worker:
    """Load the model and warm it up."""
    config, model = process.config, process.model
    try:
        backend = make_backend(config.kernels, threads=config.threads, activations=config.activations)
    except KernelsUnavailable as error:
        raise UserError(str(error)) from None
    if config.kv_dtype not in backend.kv_types:
        known = ", ".join(backend.kv_types)
        raise UserError(f"--kv-dtype {config.kv_dtype} has no {backend.name} kernel: choose one of {known}, or other --kernels")
    checkpoint = open_checkpoint(model)
    described, names = describe(model.architecture, checkpoint)
    page_bytes = backend.page_bytes(len(described.layers), config.page_size, head_shape(described), config.kv_dtype)
    asked = config.kv_memory
    if asked is not None:
        # Before the weights, so that too little memory is told at once.
        page_count(page_bytes, parse_size(asked), asked)
    backend.keep(weights_folder(checkpoint), weights_version(checkpoint))
    decoder = Decoder(described, names, checkpoint, backend, model.context)
    pages = page_count(page_bytes, backend.kv_room() if asked is None else parse_size(asked), asked)
    runner = ModelRunner(decoder, backend, pages, config.page_size, config.kv_dtype)
    runner.warm_up()
    process.detail = f"{backend.name} kernels, {pages} pages of {config.page_size} tokens"
    return Worker(process, rank_of(process.name), runner)


ROLE = Role(ToWorker, build, preload=load)
