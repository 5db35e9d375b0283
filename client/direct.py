"""The direct client: requests to the engine over ZeroMQ, without HTTP in between. The HTTP server is built on it.

It visits every tokenizer's desk. A request goes to the tokenizer with the fewest live requests of this client; what comes back is
handed to the request's `Sink`, a call for each thing that happens, which is what keeps a token cheap. When a tokenizer dies, its
requests are sent again with the tokens they have, and go on where they were.

    generate ─▶ Visit(tokenizer-i) ─▶ …
    sink.accepted, sink.text…, sink.end | sink.failed ◀─

`stream` is the comfortable way to the same: one request as an asynchronous iterator. `headrace.client.remote` does all of it from another
machine.
"""

import asyncio
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec
import zmq

from headrace.engine.actor import Visit, endpoint
from headrace.engine.messages.frontend import (
    Abort,
    Accepted,
    CallFailed,
    Describe,
    Desks,
    Detokenize,
    Detokenized,
    End,
    Failed,
    Generate,
    Kept,
    ListDesks,
    ModelCard,
    Prompt,
    PromptScores,
    Recall,
    Recalled,
    Scores,
    Text,
    ToFrontend,
    Tokenize,
    Tokenized,
    TokenScore,
)
from headrace.engine.messages.sampling import Sampling
from headrace.engine.messages.wire import Message
from headrace.engine.names import desk_name

FAREWELL_MS = 100
"""How long the last aborts may take to leave."""

_UNHEARD = "the tokenizer does not answer: try again in a moment"

Question = Tokenize | Detokenize | Describe | Recall | ListDesks


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


class RequestFailed(Exception):
    """A streamed request ended in an error; `failure` holds status, code, message and param."""

    def __init__(self, failure: Failed) -> None:
        super().__init__(failure.message)
        self.failure = failure


class Piece(NamedTuple):
    """What one step added to a streamed request."""

    text: str
    tokens: int
    """How many came; their text may be empty while it is not yet certain."""
    scores: tuple[TokenScore, ...]


class _Queue:
    """The sink of a streamed request: what happened and was not yet read."""

    def __init__(self) -> None:
        self.events: deque[Accepted | PromptScores | Piece | End | Failed] = deque()
        self.news = asyncio.Event()

    def accepted(self, message: Accepted) -> None:
        self._put(message)

    def prompt_scores(self, message: PromptScores) -> None:
        self._put(message)

    def text(self, text: str, count: int, scores: Scores | None, now: float) -> None:
        self._put(Piece(text, count, scores.scores if scores else ()))

    def end(self, message: End, now: float) -> None:
        self._put(message)

    def failed(self, message: Failed) -> None:
        self._put(message)

    def _put(self, event: Accepted | PromptScores | Piece | End | Failed) -> None:
        self.events.append(event)
        self.news.set()


class Call:
    """A question that has had no answer."""

    __slots__ = ("desk", "future", "message")

    def __init__(self, desk: str, message: Question, future: asyncio.Future) -> None:
        self.desk = desk
        self.message = message
        self.future = future


class _Live:
    """A request that has had no last word."""

    __slots__ = ("attempt", "desk", "generate", "place", "sink", "tokens")

    def __init__(self, sink: Sink, generate: Generate, place: int, desk: str) -> None:
        self.sink = sink
        self.generate = generate
        self.place = place
        self.desk = desk
        self.attempt = generate.attempt
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
        self._calls: dict[int, Call] = {}
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
        """Send a request; `sinks` has one entry for each id in `generate.requests`. They may hear of a failure before this returns."""
        desk = self._least_loaded()
        for place, (request, sink) in enumerate(zip(generate.requests, sinks, strict=True)):
            live = self._live[request] = _Live(sink, generate, place, desk)
            if generate.emitted:
                live.tokens.extend(generate.emitted[place])
            self._load[desk] += 1
        self._submit(desk, generate)

    async def stream(
        self, prompt: Prompt, sampling: Sampling, stop: Sequence[str] = (), seed: int | None = None
    ) -> AsyncGenerator[Accepted | PromptScores | Piece | End, None]:
        """One continuation of `prompt`: an `Accepted`, a `Piece` a step, an `End`. `seed` has 64 bits; None draws one.

        Raises `RequestFailed`. Closing the generator early (`contextlib.aclosing`) aborts the request.
        """
        queue, ids = _Queue(), self.new_ids(1)
        drawn = secrets.randbits(64) if seed is None else seed
        self.generate(Generate(ids, (drawn,), prompt, sampling, tuple(stop)), [queue])
        try:
            while True:
                while queue.events:
                    event = queue.events.popleft()
                    if isinstance(event, Failed):
                        raise RequestFailed(event)
                    yield event
                    if isinstance(event, End):
                        return
                queue.news.clear()
                await queue.news.wait()
        finally:
            self.abort(ids)

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
        return await self._ask(Tokenize(self._new_id(), prompt, add_special_tokens, return_token_strs))

    async def detokenize(self, ids: tuple[int, ...]) -> Detokenized:
        """Text of token ids. Raises `CallError`."""
        return await self._ask(Detokenize(self._new_id(), ids))

    async def recall(self, answer: str, tenant: str = "") -> list[Kept]:
        """The requests of an answer that lost its reader, as far as they came. They end wherever they still run.

        Empty when it is not known. What is found can be given to `generate` with new ids, and goes on after the tokens in `emitted`.
        """
        found: list[Recalled] = await asyncio.gather(*(self._ask(Recall(self._new_id(), answer, tenant), desk) for desk in self._visits))
        return [kept for one in found for kept in one.kept]

    async def describe(self) -> ModelCard:
        """What is being served. Raises `CallError`."""
        return await self._ask(Describe(self._new_id()))

    def tokenizer_died(self, name: str) -> None:
        """Send what a dead tokenizer owes again, requests with the tokens they have. Its successor takes what finds no other."""
        self._send_again(name, [desk for desk in self._load if desk != name] or [name])

    def _send_again(self, name: str, desks: Sequence[str]) -> None:
        """Hang up on the desk `name`, and send what it owes to `desks`."""
        # What it said and nobody has read yet will be said again; what waits for it is not meant for who comes next.
        self._hang_up(name)
        self._visits[name] = self._visit(name)
        for call in self._calls.values():
            if call.desk == name:
                call.desk = min(desks, key=self._load.__getitem__)
                self._send_call(call)
        lost = [(request, live) for request, live in self._live.items() if live.desk == name]
        for request, live in lost:
            generate, place = live.generate, live.place
            desk = min(desks, key=self._load.__getitem__)
            self._load[name] -= 1
            self._load[desk] += 1
            live.desk = desk
            live.attempt += 1
            again = msgspec.structs.replace(
                generate,
                requests=(request,),
                seeds=(generate.seeds[place],),
                emitted=(tuple(live.tokens),),
                first_choice=generate.first_choice + place,
                attempt=live.attempt,
            )
            self._submit(desk, again)

    def close(self) -> None:
        """Abort what is live and hang up."""
        self.abort(list(self._live))
        for visit in self._visits.values():
            visit.close(linger_ms=FAREWELL_MS)
        self._context.destroy()

    def _hang_up(self, name: str) -> None:
        self._visits[name].close()

    def _least_loaded(self) -> str:
        return min(self._load, key=self._load.__getitem__)

    def _visit(self, name: str) -> Visit:
        visit = Visit(self._context, endpoint(self._run_dir, desk_name(name)), self._identity, ToFrontend)
        visit.open(self._receive)
        return visit

    def _new_id(self) -> int:
        return self.new_ids(1)[0]

    def _submit(self, desk: str, generate: Generate) -> None:
        if not self._visits[desk].send(generate):
            for request in generate.requests:
                if live := self._forget(request):
                    live.sink.failed(Failed(request, 503, "overloaded", _UNHEARD, retry_after=1.0))

    async def _ask(self, message: Question, desk: str | None = None) -> Any:
        desk = desk or self._least_loaded()
        call = self._calls[message.call] = Call(desk, message, asyncio.get_running_loop().create_future())
        self._send_call(call)
        try:
            return await call.future
        finally:
            del self._calls[message.call]

    def _send_call(self, call: Call) -> None:
        if not self._visits[call.desk].send(call.message) and not call.future.done():
            call.future.set_exception(CallError(CallFailed(call.message.call, 503, "overloaded", _UNHEARD)))

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
            case Tokenized() | Detokenized() | ModelCard() | Recalled() | Desks():
                if (call := self._calls.get(message.call)) and not call.future.done():
                    call.future.set_result(message)
            case CallFailed():
                if (call := self._calls.get(message.call)) and not call.future.done():
                    call.future.set_exception(CallError(message))

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
