"""A stage for the tokenizer: the actor on the test's event loop, with a frontend and a scheduler played by the test."""

import asyncio
from pathlib import Path

from headrace.engine.actor import Mailbox, Visit
from headrace.engine.checkpoint.card import ModelFiles
from headrace.engine.config import Config
from headrace.engine.messages.frontend import Accepted, End, Failed, Generate, PromptScores, Text, TextPrompt, ToFrontend
from headrace.engine.messages.lifecycle import ToChild
from headrace.engine.messages.sampling import Sampling
from headrace.engine.messages.tokens import Cancel, FromScheduler, Submit, TokenEnd, Tokens, ToScheduler
from headrace.engine.messages.wire import Message
from headrace.engine.process import EngineSpec, Process
from headrace.tokenizer_proc.chat import ChatTemplates
from headrace.tokenizer_proc.tokenizer import TokenizerActor
from headrace.tokenizer_proc.vocabulary import Tokenizer
from tests.tokenizer_proc import samples


class Recorder:
    """Keeps what it gets and lets a test wait for it."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self._changed = asyncio.Event()

    def receive(self, message: Message) -> None:
        self.messages.append(message)
        self._changed.set()

    def settle(self) -> None:
        pass

    def of(self, kind) -> list:
        return [message for message in self.messages if isinstance(message, kind)]

    async def until(self, condition) -> None:
        async with asyncio.timeout(10):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def next(self, kind, count: int = 1) -> list:
        """All messages of a kind, once there are `count`."""
        await self.until(lambda: len(self.of(kind)) >= count)
        return self.of(kind)


class Frontend(Recorder):
    """A frontend: adds up what it is told of each request."""

    def __init__(self, process: Process, name: bytes) -> None:
        super().__init__()
        self.texts: dict[int, str] = {}
        self.tokens: dict[int, list[int]] = {}
        self.last_words: dict[int, End | Failed] = {}
        self.scores: dict[int, list] = {}
        self.visit = Visit(process.context, process.address(f"{process.name}.desk"), name, ToFrontend)
        self.visit.open(self.receive)

    def receive(self, message: Message) -> None:
        match message:
            case Text():
                place = 0
                for request, text, count in zip(message.requests, message.texts, message.counts, strict=True):
                    assert request not in self.last_words
                    self.texts[request] = self.texts.get(request, "") + text
                    self.tokens.setdefault(request, []).extend(message.tokens[place : place + count])
                    place += count
                assert place == len(message.tokens)
                for scores in message.scores:
                    self.scores.setdefault(scores.request, []).extend(scores.scores)
                for end in message.ends:
                    assert end.request not in self.last_words
                    self.last_words[end.request] = end
            case Failed():
                assert message.request not in self.last_words
                self.last_words[message.request] = message
            case Accepted() | PromptScores():
                assert message.request not in self.last_words
        super().receive(message)

    def send(self, message: Message) -> None:
        assert self.visit.send(message)

    def generate(self, *requests: int, prompt="Hello", **fields) -> Generate:
        prompt = TextPrompt(prompt) if isinstance(prompt, str) else prompt
        sampling = Sampling(**{name: fields.pop(name) for name in list(fields) if name in Sampling.__struct_fields__})
        seeds = fields.pop("seeds", tuple(range(len(requests))))
        message = Generate(requests, seeds, prompt, sampling, **fields)
        self.send(message)
        return message

    async def ended(self, *requests: int) -> list[End | Failed]:
        await self.until(lambda: all(request in self.last_words for request in requests))
        return [self.last_words[request] for request in requests]


class Stage:
    def __init__(
        self, run_dir: Path, tokenizer: Tokenizer | None = None, templates: ChatTemplates | None = None, model: ModelFiles | None = None
    ):
        self.tokenizer = tokenizer or samples.default_tokenizer()
        parts = samples.default_parts()
        self.process = Process(run_dir, "tokenizer-0", 1, EngineSpec(Config(), model or samples.default_model()))
        self.scheduler = Recorder()
        self.scheduler_box = Mailbox(self.process.context, self.process.address("scheduler"), ToScheduler)
        self.scheduler_box.open(self.scheduler)
        self.box = Mailbox(self.process.context, self.process.address("tokenizer-0"), FromScheduler | ToChild)
        self.actor = TokenizerActor(self.process, self.tokenizer, templates or ChatTemplates(parts.templates, parts.names))
        self.box.open(self.actor)
        self.frontends: list[Frontend] = []
        self.frontend = self.visit(b"server-0")

    def visit(self, name: bytes) -> Frontend:
        self.frontends.append(Frontend(self.process, name))
        return self.frontends[-1]

    def tell(self, message: Message) -> None:
        """Send as the scheduler or the supervisor."""
        assert self.process.send("tokenizer-0", message)

    def emit(self, request: int, tokens, first: int = 0, end: str | None = None, **columns) -> None:
        """Give a request its next tokens, in one step."""
        stop_token = columns.pop("stop_token", None)
        ends = [] if end is None else [TokenEnd(request, end, stop_token, 3, 0.25, 1)]
        tokens = list(tokens)
        self.tell(Tokens(1, 1, [request] * len(tokens), list(range(first, first + len(tokens))), tokens, ends=ends, **columns))

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special=False)

    async def submitted(self, count: int = 1) -> list[Submit]:
        return await self.scheduler.next(Submit, count)

    async def cancelled(self, count: int = 1) -> list[Cancel]:
        return await self.scheduler.next(Cancel, count)

    def forgotten(self) -> bool:
        """Nothing is left of any request."""
        actor = self.actor
        return not (actor._live or actor._jobs or actor._touched or actor._orphans)

    async def close(self) -> None:
        await self.actor.close()
        self.box.close()
        self.scheduler_box.close()
        for frontend in self.frontends:
            frontend.visit.close()
        self.process.context.destroy(linger=0)
