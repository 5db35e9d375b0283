"""A scheduler, a worker with a model and their wires in one process: requests in, tokens and logprobs out, under conditions of the test's
choice. Nothing here waits for anything, so that many ways to bring the same requests through an engine can be compared.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from unittest.mock import patch

import msgspec

from headrace.engine.checkpoint.card import ModelFiles
from headrace.engine.config import Config
from headrace.engine.messages.lifecycle import FromChild, Started, ToChild
from headrace.engine.messages.sampling import Sampling
from headrace.engine.messages.steps import FromWorker, ToWorker
from headrace.engine.messages.tokens import FromScheduler, Refused, Submit, Tokens, ToScheduler
from headrace.engine.messages.wire import Message
from headrace.engine.process import EngineSpec
from headrace.engine.scheduler import epoch as epoch_module
from headrace.engine.scheduler import scheduler as scheduler_module
from headrace.engine.scheduler.scheduler import Scheduler
from headrace.workers import worker as worker_module
from headrace.workers.runner import ModelRunner
from headrace.workers.worker import Worker
from tests.engine.protocol.network import Died, Network, Surroundings
from tests.engine.protocol.peers import FRONTEND, Supervisor
from tests.workers.model.drive import Loaded

TOKENIZER, WORKER = "tokenizer-0", "worker-0"
MODEL = ModelFiles("tiny", "/nowhere", "gguf", "llama", context=4096, vocab_size=1 << 16, end_tokens=(), bos_token=1, weight_bytes=0)
"""What the scheduler must know of any model."""


class Request(msgspec.Struct, frozen=True):
    prompt: tuple[int, ...]
    sampling: Sampling
    seed: int


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[tuple] = field(default_factory=list)
    """(logprob, ids of the most likely tokens, theirs), one a token."""
    reason: str = ""


class Ear:
    """Takes what the scheduler hands out, each token once."""

    def __init__(self) -> None:
        self.answers: dict[int, Answer] = {}
        self.tokens = 0
        self.preemptions = 0

    def receive(self, message: Message) -> None:
        match message:
            case Tokens():
                for request, index, token in zip(message.requests, message.index, message.tokens, strict=True):
                    tokens = self._of(request).tokens
                    assert index == len(tokens), f"token {index} of {request} came after {len(tokens)}"
                    tokens.append(token)
                    self.tokens += 1
                for one in message.logprobs:
                    known = self._of(one.request).logprobs
                    assert one.index == len(known)
                    known.append((one.logprob, one.top_ids, one.top_logprobs))
                for end in message.ends:
                    self._of(end.request).reason = end.reason
                    self.preemptions += end.preemptions
            case Refused():
                raise AssertionError(message.message)

    def settle(self) -> None:
        """Nothing waits for the end of a burst."""

    def _of(self, request: int) -> Answer:
        return self.answers.setdefault(request, Answer())


class Company:
    """One engine. `ahead` says whether a plan may be sent before the result of the one before it is back."""

    def __init__(self, loaded: Loaded, pages: int = 1024, page_size: int = 16, ahead: bool = True, **settings) -> None:
        self.ear = Ear()
        self.right = self.cached = 0
        """Drafted tokens that proved right, and prompt tokens that the cache gave."""
        self._ahead = ahead
        self._next = 0
        self._network = network = Network(0)
        spec = EngineSpec(Config(**settings), MODEL)

        def add(name: str, union: object, build: Callable[[Surroundings], object]) -> None:
            def born(process: Surroundings) -> object:
                actor = build(process)
                process.send("supervisor", Started(process.name, process.incarnation))
                return actor

            network.add(Surroundings(network, name, spec, union | ToChild, born))

        def worker(process: Surroundings) -> Worker:
            runner = ModelRunner(loaded.decoder, loaded.backend, pages, page_size, spec.config.kv_dtype)
            return Worker(process, 0, runner)

        supervisor = Supervisor(network, [WORKER])
        network.add(Surroundings(network, "supervisor", spec, FromChild | Died, lambda process: supervisor)).boot()
        add(TOKENIZER, FromScheduler, lambda process: self.ear)
        add(FRONTEND, FromScheduler, lambda process: Ear())  # whom the supervisor tells of deaths, and who does nothing about them
        add("scheduler", ToScheduler | FromWorker, Scheduler)
        add(WORKER, ToWorker, worker)
        for name in (TOKENIZER, FRONTEND, "scheduler", WORKER):
            network.start(name)

    def ask(self, requests: Iterable[Request], kill_after: tuple[int, ...] = ()) -> list[Answer]:
        """All of `requests` at once, to their ends. The worker is killed whenever so many tokens have come."""
        numbers = []
        for request in requests:
            self._next += 1
            numbers.append(self._next)
            submit = Submit(self._next, TOKENIZER, list(request.prompt), request.sampling, request.seed)
            self._network.processes[TOKENIZER].send("scheduler", submit)
        kills = sorted(kill_after, reverse=True)
        begun = self.ear.tokens
        with ExitStack() as stack:
            for module in (scheduler_module, epoch_module, worker_module):
                # What is planned depends on how long steps take: here they all take the same.
                stack.enter_context(patch.object(module, "time", self._network.clock))
            if not self._ahead:
                stack.enter_context(patch.object(scheduler_module, "plan_ahead", _never))
            while ready := self._network.ready():
                for channel in ready:
                    if channel.frames and (channel.name == "kernel" or self._network.alive(channel.to)):
                        self._network.deliver(channel)
                if kills and self.ear.tokens - begun >= kills[-1]:
                    kills.pop()
                    self._network.kill(WORKER, by_itself=False)
        assert not kills, "there were to be more tokens"
        answers = [self.ear.answers[number] for number in numbers]
        assert all(answer.reason for answer in answers)
        meters = self._network.processes["scheduler"].actor._meters
        self.right, self.cached = meters._accepted.value, meters.cached_tokens.value
        return answers


def _never(*_: object) -> None:
    """No plan ahead."""
