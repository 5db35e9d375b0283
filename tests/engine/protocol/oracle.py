"""A model small enough to be sure of, twice: as a plain function of a request, and as a runner that reads its context from KV pages.

The function is the oracle: what a request emits follows from its seed and from every token before. The runner gets there through page
tables and slots as a real model does: a position's value depends on all values before it, which are read from where the ledger says that
they lie. Pages that are shared wrongly, freed too early or taken twice give other values, and so other tokens.

    tokens ─▶ value p = crc(token p, values 0 … p - 1) ─▶ kv[slot p]          context = crc(all values) ─▶ next token
"""

from array import array
from dataclasses import dataclass
from functools import lru_cache
from zlib import crc32

from headrace.engine.ledger.ledger import Row
from headrace.engine.messages.sampling import Sampling
from headrace.workers.draft.ngram import NGram
from headrace.workers.worker import Outcome

END, STOP = 2, 7
"""The model's end token, and one that some requests name as theirs."""
FIRST, WORDS = 3, 4
"""Ordinary tokens are FIRST … FIRST + WORDS - 1."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What a request asks for."""

    prompt: tuple[int, ...]
    seed: int
    sampling: Sampling

    @property
    def ends(self) -> frozenset[int]:
        return frozenset(self.sampling.stop_token_ids) | (frozenset() if self.sampling.ignore_eos else {END})


def read(context: int, token: int) -> tuple[int, int]:
    """The value of `token` behind `context`, and the context that includes it."""
    value = crc32(token.to_bytes(4, "little"), context)
    return value, crc32(value.to_bytes(4, "little"), context)


def choose(ask: Ask, context: int, tokens: list[int], emitted: int) -> int | None:
    """The token that follows; None where this model has no valid logits. Often it repeats what stood three places before, so that drafts
    that are looked up in the text prove right."""
    dice = crc32(ask.seed.to_bytes(8, "little"), context)
    if dice % 61 == 0:
        return None
    if emitted >= ask.sampling.min_tokens and dice % 17 == 0:
        return END if dice % 2 else STOP
    if dice % 3 and len(tokens) > 2 and FIRST <= tokens[-3] < FIRST + WORDS:
        return tokens[-3]
    return FIRST + dice // 3 % WORDS


@lru_cache(4096)
def answer(ask: Ask) -> tuple[tuple[int, ...], str]:
    """All that `ask` emits by itself, and why it ends: "stop", "length" or "error"."""
    tokens = list(ask.prompt)
    context = 0
    for token in tokens:
        context = read(context, token)[1]
    most = ask.sampling.max_tokens or 0
    emitted: list[int] = []
    while len(emitted) < most:
        token = choose(ask, context, tokens, len(emitted))
        if token is None:
            return tuple(emitted), "error"
        tokens.append(token)
        emitted.append(token)
        context = read(context, token)[1]
        if token in ask.ends and len(emitted) >= ask.sampling.min_tokens:
            return tuple(emitted), "stop"
    return tuple(emitted), "length"


class PagedRunner:
    """The runner of one rank: `kv` is its device's memory."""

    def __init__(self, pages: int, page_size: int) -> None:
        self.pages = pages
        self.page_size, self.step_tokens = page_size, 256
        self._kv = array("I", bytes(4 * pages * page_size))
        self._drafter = NGram()

    def step(self, rows: list[Row]) -> Outcome:
        outcome = Outcome([])
        # What was there before this step is read before any of it is written.
        contexts = [self._context(row) for row in rows]
        drafting = any(row.lookahead for row in rows)
        for row, context in zip(rows, contexts, strict=True):
            sequence = row.sequence
            draft = self._drafter.propose(sequence, row.lookahead) if row.lookahead else []
            end = row.start + row.length
            after = []
            for place, token in enumerate(sequence.tokens[row.start : end] + draft, row.start):
                value, context = read(context, token)
                self._kv[self._slot(sequence.pages, place)] = value
                after.append(context)
            if not row.emits:
                continue
            ask = Ask(tuple(sequence.tokens[: sequence.prompt]), sequence.seed, sequence.sampling)
            emitted = self._verify(ask, after[row.length - 1 :], draft, list(sequence.tokens), sequence.emitted)
            outcome.tokens.append(emitted)
            if drafting:
                outcome.drafted.append(len(draft))
        return outcome

    def _verify(self, ask: Ask, contexts: list[int], draft: list[int], tokens: list[int], emitted: int) -> list[int]:
        """The token behind the row, and behind each draft for as long as the drafts are what was chosen."""
        chosen: list[int] = []
        for place, context in enumerate(contexts):
            if place and (chosen[-1] != draft[place - 1] or chosen[-1] in ask.ends):
                break
            token = choose(ask, context, tokens, emitted + place)
            if token is None:
                break
            chosen.append(token)
            tokens.append(token)
        return chosen

    def _context(self, row: Row) -> int:
        pages = row.sequence.pages
        values = array("I", [self._kv[self._slot(pages, place)] for place in range(row.start)])
        return crc32(values.tobytes())

    def _slot(self, pages: list[int], place: int) -> int:
        return pages[place // self.page_size] * self.page_size + place % self.page_size
