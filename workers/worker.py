"""A worker process: one rank, one device. Applies plans to its ledger, computes the rows, commits, replies.

    Begin ─▶ a fresh ledger
    Plan ──▶ ledger.apply ─▶ rows ─▶ Runner.step ─▶ tokens ─▶ ledger.commit ─▶ StepResult

What computes is a `Runner`: the model on its device (`runner.py`), or for tests of the control plane one without a model
(`fake.py`). This file knows neither torch nor shapes. A step runs on the event loop's own thread: nothing else is to be done meanwhile.
"""

import time
from dataclasses import dataclass, field
from typing import Protocol

from headrace.engine.ledger.ledger import Ledger, Row
from headrace.engine.messages.lifecycle import PeerDied
from headrace.engine.messages.steps import Begin, Hello, Plan, StepResult, StepTimes, WorkerUp
from headrace.engine.messages.tokens import PromptLogprobs, TokenLogprobs
from headrace.engine.messages.wire import Message
from headrace.engine.names import SCHEDULER
from headrace.engine.process import Process


@dataclass(slots=True)
class Outcome:
    """What a runner made of the rows of a step. `tokens` has those of each row that emits, in the order of the rows: one, and one more
    for each draft that proved right; none for a row whose logits are invalid, which ends that request and no other."""

    tokens: list[list[int]]
    drafted: list[int] = field(default_factory=list)
    """How many tokens were drafted for each of these rows; empty if none were for any."""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)
    prepare_ns: int = 0
    forward_ns: int = 0
    sample_ns: int = 0


class Runner(Protocol):
    """Computes rows. Owns the device's memory: `pages` KV pages of `page_size` tokens. A step should have no more than `step_tokens`."""

    pages: int
    page_size: int
    step_tokens: int

    def step(self, rows: list[Row]) -> Outcome:
        """Compute every row: write its keys and values to its sequence's pages, and sample where `row.emits`. Up to `row.lookahead` drafts
        may be verified behind it."""
        ...


class Worker:
    """The actor of one rank."""

    def __init__(self, process: Process, rank: int, runner: Runner) -> None:
        self._process = process
        self._rank = rank
        self._runner = runner
        self._epoch = -1
        self._scheduler = -1
        """The latest incarnation of the scheduler that said hello."""
        self._ledger: Ledger | None = None
        self._announce()

    def receive(self, message: Message) -> None:
        match message:
            case Plan():
                self._step(message)
            case Begin():
                if message.epoch > self._epoch:
                    self._epoch = message.epoch
                    self._ledger = Ledger(message)
            case Hello():
                self._scheduler = max(self._scheduler, message.incarnation)
                self._announce()
            case PeerDied(name=name, incarnation=incarnation) if name == SCHEDULER and incarnation >= self._scheduler:
                self._process.post.forget(SCHEDULER)

    def settle(self) -> None:
        """Nothing waits for the end of a burst."""

    def _announce(self) -> None:
        runner = self._runner
        self._process.send(SCHEDULER, WorkerUp(self._rank, self._process.incarnation, runner.pages, runner.page_size, runner.step_tokens))

    def _step(self, plan: Plan) -> None:
        ledger = self._ledger
        if ledger is None or plan.epoch != self._epoch:
            return
        begun = time.perf_counter_ns()
        rows = ledger.apply(plan)
        digest = ledger.digest
        applied = time.perf_counter_ns()
        outcome = self._runner.step(rows) if rows else Outcome([])
        emitting = [row.sequence.request for row in rows if row.emits]
        result = StepResult(
            epoch=plan.epoch,
            step=plan.step,
            rank=self._rank,
            digest=digest,
            requests=emitting,
            counts=[len(tokens) for tokens in outcome.tokens],
            tokens=[token for tokens in outcome.tokens for token in tokens],
            logprobs=outcome.logprobs,
            prompt_logprobs=outcome.prompt_logprobs,
            times=StepTimes(
                prepare=applied - begun + outcome.prepare_ns,
                forward=outcome.forward_ns,
                sample=outcome.sample_ns,
                total=time.perf_counter_ns() - begun,
            ),
            drafted=outcome.drafted,
        )
        self._process.send(SCHEDULER, result)
        ledger.commit(result)


def rank_of(name: str) -> int:
    """The rank in a worker's process name."""
    return int(name.rpartition("-")[2])
