"""The direct client: requests to the engine over ZeroMQ, without HTTP in between. The HTTP server is built on it.

It visits every tokenizer's desk. A request goes to the tokenizer with the fewest live requests of this client; what comes back is
handed to the request's `Sink`, a call for each thing that happens, which is what keeps a token cheap. When a tokenizer dies, its
requests are sent again with the tokens they have, and go on where they were.

    generate ─▶ Visit(tokenizer-i) ─▶ …
    sink.accepted, sink.text…, sink.end | sink.failed ◀─
"""

import asyncio
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import zmq

from headrace.engine.actor import Visit, endpoint
from headrace.engine.messages.frontend import (
    Abort,
    Accepted,
    CallFailed,
    Describe,
    Detokenize,
    Detokenized,
    End,
    Failed,
    Generate,
    ModelCard,
    Prompt,
    PromptScores,
    Scores,
    Text,
    ToFrontend,
    Tokenize,
    Tokenized,
)
from headrace.engine.messages.wire import Message
from headrace.engine.names import desk_name


class Sink(Protocol):
    """Where one request's answer goes. Called on the event loop; must not block. `now` is a monotonic time in seconds."""

    def accepted(self, message: Accepted) -> None: ...

    def prompt_scores(self, message: PromptScores) -> None: ...

    def text(self, text: str, count: int, scores: Scores | None, now: float) -> None:
        """`count` tokens came, and made `text` certain."""
        ...

    def end(self, message: End, now: float) -> None:
        """The last word; nothing follows."""
        ...

    def failed(self, message: Failed) -> None:
        """The other last word."""
        ...


class CallError(Exception):
    """A tokenizer could not serve a call; `failure` holds status, code, message and param."""

    def __init__(self, failure: CallFailed) -> None:
        super().__init__(failure.message)
        self.failure = failure


class _Live:
    """A request that has had no last word."""

    __slots__ = ("desk", "generate", "place", "sink", "tokens")

    def __init__(self, sink: Sink, generate: Generate, place: int, desk: str) -> None:
        self.sink = sink
        self.generate = generate
        self.place = place
        self.desk = desk
        self.tokens: list[int] = []


class DirectClient:
    """Talks to the tokenizers named `tokenizers` of the engine that runs in `run_dir`. Needs a running event loop.

    `identity` names this client to the tokenizers and must be unique among their clients; None draws one.
    """

    def __init__(self, run_dir: Path, tokenizers: Sequence[str], identity: bytes | None = None) -> None:
        self._context = zmq.Context()
        self._run_dir = run_dir
        self._identity = b"c" + (identity or secrets.token_bytes(8))
        self._visits = {name: self._visit(name) for name in tokenizers}
        self._load = dict.fromkeys(tokenizers, 0)
        """Live requests by tokenizer."""
        self._live: dict[int, _Live] = {}
        self._calls: dict[int, tuple[asyncio.Future, str]] = {}
        self._next_id = secrets.randbits(40) << 24
        """Ids of this client: 40 random bits, then a count."""

    @property
    def live(self) -> int:
        """Requests that have had no last word."""
        return len(self._live)

    def new_ids(self, count: int) -> tuple[int, ...]:
        """Fresh request ids, unique over clients and restarts."""
        first = self._next_id + 1
        self._next_id += count
        return tuple(range(first, first + count))

    def generate(self, generate: Generate, sinks: Sequence[Sink]) -> None:
        """Send a request; `sinks` has one entry for each id in `generate.requests`."""
        desk = min(self._load, key=self._load.__getitem__)
        for place, (request, sink) in enumerate(zip(generate.requests, sinks, strict=True)):
            self._live[request] = _Live(sink, generate, place, desk)
            self._load[desk] += 1
        self._visits[desk].send(generate)

    def abort(self, requests: Sequence[int]) -> None:
        """These are no longer wanted: their sinks hear nothing more."""
        by_desk: dict[str, list[int]] = {}
        for request in requests:
            if live := self._forget(request):
                by_desk.setdefault(live.desk, []).append(request)
        for desk, ids in by_desk.items():
            self._visits[desk].send(Abort(tuple(ids)))

    async def tokenize(self, prompt: Prompt, add_special_tokens: bool = True, return_token_strs: bool = False) -> Tokenized:
        """Token ids of a prompt. Raises `CallError`."""
        return await self._call(lambda call: Tokenize(call, prompt, add_special_tokens, return_token_strs))

    async def detokenize(self, ids: tuple[int, ...]) -> Detokenized:
        """Text of token ids. Raises `CallError`."""
        return await self._call(lambda call: Detokenize(call, ids))

    async def describe(self) -> ModelCard:
        """What is being served."""
        return await self._call(Describe)

    def tokenizer_died(self, name: str) -> None:
        """Send the requests of a dead tokenizer again, with the tokens they have. Its successor takes what finds no other."""
        # What the dead one said and nobody has read yet will be said again; what waits for it is not meant for its successor.
        self._visits[name].close()
        self._visits[name] = self._visit(name)
        for call, (future, desk) in self._calls.items():
            if desk == name and not future.done():
                future.set_exception(CallError(CallFailed(call, 503, "recovering", "the tokenizer died: try again in a moment")))
        lost = [(request, live) for request, live in self._live.items() if live.desk == name]
        others = [desk for desk in self._load if desk != name] or [name]
        for request, live in lost:
            generate, place = live.generate, live.place
            desk = min(others, key=self._load.__getitem__)
            self._load[name] -= 1
            self._load[desk] += 1
            live.desk = desk
            again = Generate(
                requests=(request,),
                seeds=(generate.seeds[place],),
                prompt=generate.prompt,
                sampling=generate.sampling,
                stop=generate.stop,
                include_stop=generate.include_stop,
                skip_special_tokens=generate.skip_special_tokens,
                want_prompt=generate.want_prompt,
                tenant=generate.tenant,
                priority=generate.priority,
                emitted=(tuple(live.tokens),),
            )
            self._visits[desk].send(again)

    def close(self) -> None:
        """Abort what is live and hang up."""
        self.abort(list(self._live))
        for visit in self._visits.values():
            visit.close()
        self._context.destroy(linger=100)

    def _visit(self, name: str) -> Visit:
        visit = Visit(self._context, endpoint(self._run_dir, desk_name(name)), self._identity, ToFrontend)
        visit.open(self._receive)
        return visit

    async def _call(self, make) -> Message:
        (call,) = self.new_ids(1)
        future = asyncio.get_running_loop().create_future()
        desk = min(self._load, key=self._load.__getitem__)
        self._calls[call] = (future, desk)
        self._visits[desk].send(make(call))
        try:
            return await future
        finally:
            del self._calls[call]

    def _forget(self, request: int) -> _Live | None:
        live = self._live.pop(request, None)
        if live:
            self._load[live.desk] -= 1
        return live

    def _receive(self, message: Message) -> None:
        match message:
            case Text():
                self._text(message)
            case Accepted():
                if live := self._live.get(message.request):
                    live.sink.accepted(message)
            case PromptScores():
                if live := self._live.get(message.request):
                    live.sink.prompt_scores(message)
            case Failed():
                if live := self._forget(message.request):
                    live.sink.failed(message)
            case Tokenized() | Detokenized() | ModelCard():
                future, _ = self._calls.get(message.call, (None, ""))
                if future and not future.done():
                    future.set_result(message)
            case CallFailed():
                future, _ = self._calls.get(message.call, (None, ""))
                if future and not future.done():
                    future.set_exception(CallError(message))

    def _text(self, message: Text) -> None:
        now = time.monotonic()
        all_live = self._live
        scores = {one.request: one for one in message.scores} if message.scores else None
        tokens = message.tokens
        at = 0
        for request, text, count in zip(message.requests, message.texts, message.counts, strict=True):
            live = all_live.get(request)
            if live is not None:
                if count == 1:
                    live.tokens.append(tokens[at])
                else:
                    live.tokens.extend(tokens[at : at + count])
                live.sink.text(text, count, scores.get(request) if scores else None, now)
            at += count
        for end in message.ends:
            if live := self._forget(end.request):
                live.sink.end(end, now)
