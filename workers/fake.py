"""A worker without a model: keeps the ledger like a real one and emits tokens that follow from seed and position alone.

With it the whole control plane (processes, wires, scheduling, recovery) can be tested and timed by itself. Run as
`headrace.workers.fake`, in the place of `headrace.workers.runner`.
"""

from headrace.engine.ledger.ledger import Row
from headrace.engine.messages.steps import ToWorker
from headrace.engine.messages.tokens import PromptLogprobs, TokenLogprobs
from headrace.engine.process import Process, Role
from headrace.workers.worker import Outcome, Worker, rank_of

PAGES = 65536


def fake_token(seed: int, position: int, vocab_size: int) -> int:
    """The token that the fake worker emits at `position` (0 is the first emitted) of a request: any but the first 256 of the vocabulary.

    Low ids are where vocabularies keep their special tokens, so that no request ends by accident.
    """
    mixed = (seed * 0x9E3779B97F4A7C15 + position * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    return 256 + (mixed >> 33) % max(1, min(vocab_size, 20_000) - 256)


class FakeRunner:
    pages = PAGES
    step_tokens = 256

    def __init__(self, page_size: int, vocab_size: int) -> None:
        self.page_size = page_size
        self._vocab_size = vocab_size

    def step(self, rows: list[Row]) -> Outcome:
        outcome = Outcome([])
        for row in rows:
            sequence = row.sequence
            if row.emits:
                # As if some of the drafts that there was room for had proved right.
                count = 1 + (sequence.seed + sequence.emitted) % (row.lookahead + 1)
                places = range(sequence.emitted, sequence.emitted + count)
                outcome.tokens.append([fake_token(sequence.seed, place, self._vocab_size) for place in places])
                outcome.drafted.append(row.lookahead)
                if sequence.sampling.logprobs is not None:
                    outcome.logprobs += [TokenLogprobs(sequence.request, place, -1.0) for place in places]
            if sequence.sampling.prompt_logprobs is not None and row.start < sequence.prompt - 1:
                count = min(row.start + row.length, sequence.prompt - 1) - row.start
                outcome.prompt_logprobs.append(PromptLogprobs(sequence.request, row.start + 1, [-1.0] * count, [()] * count, [()] * count))
        return outcome


async def build(process: Process) -> Worker:
    """A fake rank."""
    return Worker(process, rank_of(process.name), FakeRunner(process.config.page_size, process.model.vocab_size))


ROLE = Role(ToWorker, build)
