"""A stage for control-plane tests: scheduler and fake workers as actors on one event loop, the test in the part of their peers."""

import asyncio
from pathlib import Path

import pytest

from headrace.engine.actor import Mailbox
from headrace.engine.checkpoint.card import ModelFiles
from headrace.engine.config import Config
from headrace.engine.messages.lifecycle import FromChild, PeerDied, ToChild
from headrace.engine.messages.sampling import Sampling
from headrace.engine.messages.steps import FromWorker, ToWorker
from headrace.engine.messages.tokens import FromScheduler, Moved, Refused, Submit, TokenEnd, Tokens, ToScheduler
from headrace.engine.messages.wire import Message
from headrace.engine.process import EngineSpec, Process
from headrace.engine.scheduler.scheduler import Scheduler
from headrace.workers.fake import FakeRunner, fake_token
from headrace.workers.worker import Worker

MODEL = ModelFiles("fake", "/nowhere", "gguf", "llama", context=4096, vocab_size=32_000, end_tokens=(2,), bos_token=1, weight_bytes=0)
DRAFTING = pytest.mark.parametrize("stage", [{}, {"draft": "ngram"}], indirect=True, ids=["one at a time", "drafting"])


def expected(request: int, count: int) -> list[int]:
    """The first tokens that the fake worker gives a request."""
    return [fake_token(request, index, MODEL.vocab_size) for index in range(count)]


class Recorder:
    """A mailbox that keeps what it gets and lets a test wait for it."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self._changed = asyncio.Event()

    def receive(self, message: Message) -> None:
        self.messages.append(message)

    def settle(self) -> None:
        self._changed.set()

    async def until(self, condition, timeout: float = 10.0) -> None:
        """Wait until `condition(messages)` holds."""
        async with asyncio.timeout(timeout):
            while not condition(self.messages):
                self._changed.clear()
                await self._changed.wait()


class TokenizerPart(Recorder):
    """Stands where a tokenizer stands: collects the tokens and ends of each request."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens: dict[int, list[int]] = {}
        self.ends: dict[int, TokenEnd] = {}
        self.refused: dict[int, Refused] = {}
        self.moved: list[Moved] = []
        self.accept_repeats = False
        """Tokens out of turn are passed over, as a tokenizer does after a restart, and a request may end a second time."""

    def receive(self, message: Message) -> None:
        super().receive(message)
        match message:
            case Tokens():
                for request, index, token in zip(message.requests, message.index, message.tokens, strict=True):
                    have = self.tokens.setdefault(request, [])
                    if self.accept_repeats and index != len(have):
                        continue
                    assert index == len(have), f"token {index} of {request} came after {len(have)}"
                    have.append(token)
                for end in message.ends:
                    assert self.accept_repeats or end.request not in self.ends, f"{end.request} ended twice"
                    self.ends[end.request] = end
            case Refused():
                self.refused[message.request] = message
            case Moved():
                self.moved.append(message)

    async def all_ended(self, requests) -> None:
        await self.until(lambda _: all(request in self.ends or request in self.refused for request in requests))


class Stage:
    def __init__(self, run_dir: Path, **settings) -> None:
        self.config = Config(**settings)
        self._run_dir = run_dir
        self._incarnation = 0
        self._settled = asyncio.Event()
        """Set whenever the scheduler has done what it was told to."""
        self.tokenizer = TokenizerPart()
        self.supervisor = Recorder()
        self._actors: dict[str, tuple[Process, Mailbox, object]] = {}
        self._open("tokenizer-0", FromScheduler, lambda process: self.tokenizer)
        self._open("supervisor", FromChild, lambda process: self.supervisor)

    def start_worker(self, rank: int = 0, pages: int = 64, page_size: int = 4, spoil=None, step_tokens: int = 256) -> None:
        def build(process: Process) -> Worker:
            runner = FakeRunner(page_size, MODEL.vocab_size)
            runner.pages, runner.step_tokens = pages, step_tokens
            worker = Worker(process, rank, runner)
            if spoil:
                spoil(worker)
            return worker

        self._open(f"worker-{rank}", ToWorker, build)

    def start_scheduler(self) -> Scheduler:
        return self._open("scheduler", ToScheduler | FromWorker, Scheduler)

    def open_tokenizer(self, name: str) -> TokenizerPart:
        """One more tokenizer; the setting `tokenizers` has to count it."""
        part = TokenizerPart()
        self._open(name, FromScheduler, lambda process: part)
        return part

    def kill(self, name: str, by_itself: bool = False) -> None:
        """End an actor without a word, and let the others know as the supervisor would."""
        process, mailbox, _ = self._actors.pop(name)
        mailbox.close()
        process.post.close()
        # When this returns its address is free for a successor.
        process.context.term()
        for other_process, _, actor in list(self._actors.values()):
            other_process.post.forget(name)
            if not isinstance(actor, Recorder):
                actor.receive(PeerDied(name, process.incarnation, by_itself))

    def actor(self, name: str):
        return self._actors[name][2]

    def send(self, to: str, message: Message) -> None:
        self._actors["tokenizer-0"][0].send(to, message)

    def submit(self, request: int, prompt: list[int], max_tokens: int = 8, **fields) -> None:
        sampling = Sampling(max_tokens=max_tokens, ignore_eos=True, **fields.pop("sampling", {}))
        self.send("scheduler", Submit(request, "tokenizer-0", prompt, sampling, seed=request, **fields))

    async def all_landed(self, scheduler: Scheduler, timeout: float = 10.0) -> None:
        """Wait until no rank owes a result: only then are all ledgers of the same step. The last end may come before that."""
        async with asyncio.timeout(timeout):
            while scheduler.progress().owed_s is not None:
                self._settled.clear()
                await self._settled.wait()

    def close(self) -> None:
        for process, mailbox, _ in self._actors.values():
            mailbox.close()
            process.post.close()
        for process, _, _ in self._actors.values():
            process.context.term()

    def _open(self, name: str, union: object, build):
        self._incarnation += 1
        process = Process(self._run_dir, name, self._incarnation, EngineSpec(self.config, MODEL))
        mailbox = Mailbox(process.context, process.address(name), union | ToChild)
        actor = build(process)
        if isinstance(actor, Scheduler):
            settle = actor.settle

            def noted() -> None:
                settle()
                self._settled.set()

            actor.settle = noted
        mailbox.open(actor)
        self._actors[name] = (process, mailbox, actor)
        return actor
