"""A worker that takes its time, for tests of what happens while requests run: a step lasts STEP_S, as it would with a model.

Each token follows from the seed and from every token before it, prompt included. So a request that goes on after a restart with a token
lost, doubled or moved gives another text from there on.
"""

import time
import zlib
from array import array

from headrace.engine.ledger.ledger import Row
from headrace.engine.messages.steps import ToWorker
from headrace.engine.messages.tokens import TokenLogprobs
from headrace.engine.process import Process, Role
from headrace.workers.fake import PAGES, fake_token
from headrace.workers.worker import Outcome, Worker, rank_of

STEP_S = 0.008


class PacedRunner:
    """A `Runner` without a model."""

    pages, step_tokens = PAGES, 256

    def __init__(self, page_size: int, vocab_size: int) -> None:
        self.page_size = page_size
        self._vocab_size = vocab_size

    def step(self, rows: list[Row]) -> Outcome:
        time.sleep(STEP_S)
        outcome = Outcome([])
        for row in rows:
            if not row.emits:
                continue
            sequence, tokens = row.sequence, list(row.sequence.tokens)
            # As if some of the drafts that there was room for had proved right.
            for place in range(sequence.emitted, sequence.emitted + 1 + (sequence.seed + sequence.emitted) % (row.lookahead + 1)):
                known = zlib.crc32(array("i", tokens).tobytes())
                tokens.append(fake_token(sequence.seed ^ known, place, self._vocab_size))
                if sequence.sampling.logprobs is not None:
                    outcome.logprobs.append(TokenLogprobs(sequence.request, place, -known / 2**32))
            outcome.tokens.append(tokens[len(sequence.tokens) :])
            outcome.drafted.append(row.lookahead)
        return outcome


async def build(process: Process) -> Worker:
    return Worker(process, rank_of(process.name), PacedRunner(process.config.page_size, process.model.vocab_size))


ROLE = Role(ToWorker, build)
