"""OpenAI's routes and vLLM's tokenizer routes: read a body, send it to the engine, answer.

body ─▶ decode ─▶ validate ─▶ Generate (one a prompt) ─▶ DirectClient ─▶ Choices ─▶ whole.py | stream.py
"""

import asyncio
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import msgspec
from aiohttp import web

from headrace.client.direct import CallError, DirectClient
from headrace.engine.checkpoint.card import ModelFiles
from headrace.engine.config import Config
from headrace.engine.messages.frontend import ChatPrompt, Generate, Prompt, TextPrompt
from headrace.engine.messages.openai import requests, responses
from headrace.engine.messages.sampling import Sampling
from headrace.server.meters import RequestMeters, Timing
from headrace.server.openai.choices import Answer, Choice, usage
from headrace.server.openai.errors import Refusal, decode
from headrace.server.openai.progress import Progress
from headrace.server.openai.stream import Shape, StreamedChoice, stream_answer
from headrace.server.openai.validate import (
    chat_prompt,
    chat_sampling,
    choices,
    completion_prompts,
    completion_sampling,
    seeds,
    stops,
    timeout,
)
from headrace.server.openai.whole import chat_completion, completion

BODY_TIMEOUT = 60.0
"""Seconds in which a body must have come."""

RECALL_TIMEOUT = 5.0
"""Seconds for all tokenizers to say what they have of a broken stream."""

STREAM_NOT_FOUND = "stream_not_found"
"""The code by which a client knows that a stream cannot be gone on with here."""

TENANT = web.RequestKey("tenant", str)
"""Where a request carries whose it is, once its key was checked."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_TRACE_PARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-.{0,200})?")
_encode = msgspec.json.Encoder().encode
_chat = msgspec.json.Decoder(requests.Chat)
_completion = msgspec.json.Decoder(requests.Completion)
_tokenize = msgspec.json.Decoder(requests.TokenizeText)
_detokenize = msgspec.json.Decoder(requests.DetokenizeIds)


def request_id(request: web.Request) -> str | None:
    """The id that the client chose for its request by `x-request-id`, if it is one that can stand in a log."""
    given = request.headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else None


def _trace_parent(request: web.Request) -> str:
    """The client's `traceparent`, if it is one by its form."""
    given = request.headers.get("traceparent", "")
    return given if _TRACE_PARENT.fullmatch(given) else ""


def tenant_of(request: web.Request) -> str:
    return request.get(TENANT, "")


def engine_version() -> str:
    try:
        return version("headrace")
    except PackageNotFoundError:
        return "unknown"


class Outline(msgspec.Struct):
    """What must be known of a streamed answer to go on with it: the `notes` of its requests."""

    head: dict[str, Any]
    chat: bool
    each: int
    """Choices of each prompt."""
    choices: int
    usage: bool
    top: bool
    echo: bool
    scored: bool
    """The prompt's tokens are scored too."""


class Flow:
    """A streamed answer on its way: where its choices write, and how far they are."""

    def __init__(self, outline: Outline, meters: RequestMeters, progress: Progress) -> None:
        self.outline = outline
        self.progress = progress
        self.answer = Answer(outline.choices)
        self.shape = Shape(outline.head, outline.chat, outline.usage, outline.top)
        start = time.monotonic()
        self.sinks = [
            StreamedChoice(index, self.answer, Timing(meters, start), self.shape, progress, outline.echo, outline.scored)
            for index in range(outline.choices)
        ]

    def counts(self) -> responses.Usage:
        return usage([(index // self.outline.each, sink.finish) for index, sink in enumerate(self.sinks)])


class OpenAIRoutes:
    """The handlers."""

    def __init__(self, client: DirectClient, config: Config, model: ModelFiles, meters: RequestMeters) -> None:
        self._client = client
        self._most_choices = config.max_running + config.max_waiting
        self._timeout = config.request_timeout
        self._meters = meters
        self._fingerprint = f"headrace-{engine_version()}"
        self.serve(model)

    def serve(self, model: ModelFiles) -> None:
        """From now on this model answers."""
        self.served = model
        self._created = int(time.time())

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/chat/completions", self.chat),
            web.post("/v1/completions", self.complete),
            web.get("/v1/streams/{id}", self.resume),
            web.get("/v1/models", self.models),
            web.get("/v1/models/{model:.+}", self.model),
            web.post("/tokenize", self.tokenize),
            web.post("/detokenize", self.detokenize),
        ]

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = decode(_chat, await _body(request))
        self._check_model(body.model)
        sampling = chat_sampling(body)
        prompt = chat_prompt(body, _encode)
        make_whole = partial(chat_completion, logprobs=bool(body.logprobs))
        return await self._answer(request, body, [prompt], sampling, "chatcmpl", echo=False, make_whole=make_whole)

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = decode(_completion, await _body(request))
        self._check_model(body.model)
        sampling = completion_sampling(body)
        prompts = completion_prompts(body)
        make_whole = partial(completion, logprobs=body.logprobs, echo=body.echo)
        return await self._answer(request, body, prompts, sampling, "cmpl", echo=body.echo, make_whole=make_whole)

    async def models(self, request: web.Request) -> web.Response:
        return _json(responses.ModelList([self._card()]))

    async def model(self, request: web.Request) -> web.Response:
        self._check_model(request.match_info["model"])
        return _json(self._card())

    async def tokenize(self, request: web.Request) -> web.Response:
        body = decode(_tokenize, await _body(request))
        self._check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise Refusal("give either prompt or messages", "prompt")
        prompt: Prompt
        if body.prompt is not None:
            prompt, special = TextPrompt(body.prompt), True
        else:
            prompt, special = ChatPrompt(_encode(body.messages), body.add_generation_prompt), False
        special = special if body.add_special_tokens is None else body.add_special_tokens
        try:
            found = await self._client.tokenize(prompt, special, body.return_token_strs)
        except CallError as error:
            raise Refusal.of(error.failure) from None
        return _json(responses.Tokenized(found.ids, len(found.ids), found.context, found.token_strs))

    async def detokenize(self, request: web.Request) -> web.Response:
        body = decode(_detokenize, await _body(request))
        self._check_model(body.model)
        if any(not 0 <= token < 2**31 for token in body.tokens):
            raise Refusal("tokens holds a number that is no token id", "tokens", code="out_of_range")
        try:
            found = await self._client.detokenize(tuple(body.tokens))
        except CallError as error:
            raise Refusal.of(error.failure) from None
        return _json(responses.Detokenized(found.text))

    async def resume(self, request: web.Request) -> web.StreamResponse:
        """Go on with a stream that broke, after the event that `Last-Event-ID` names, or from the beginning without one."""
        name, tenant = request.match_info["id"], tenant_of(request)
        try:
            async with asyncio.timeout(RECALL_TIMEOUT):
                kept = await self._client.recall(name, tenant)
        except TimeoutError:
            raise Refusal("the tokenizers do not answer: try again in a moment", status=503, code="unavailable", retry_after=1) from None
        # Of one that several tokenizers had a part in, what is known furthest.
        by_choice = {
            one.generate.first_choice: one for one in sorted(kept, key=lambda one: (one.end is not None, len(one.generate.emitted[0])))
        }
        outline = msgspec.json.decode(kept[0].generate.notes, type=Outline) if kept else None
        if outline is None or len(by_choice) != outline.choices:
            message = f"no stream {name[:80]!r} is known, or not any more: streams are kept for a minute after they break or end"
            raise Refusal(message, status=404, code=STREAM_NOT_FOUND)
        flow = Flow(outline, self._meters, Progress(outline.choices, request.headers.get("Last-Event-ID")))
        ids = self._client.new_ids(outline.choices)

        def start() -> None:
            for choice, one in sorted(by_choice.items()):
                begun, emitted = flow.progress.of(choice), one.generate.emitted[0]
                if begun.tokens > len(emitted):
                    raise Refusal(f"Last-Event-ID names {begun.tokens} tokens, there were {len(emitted)}", "Last-Event-ID")
                if begun.ended and one.end is not None:
                    flow.sinks[choice].end(one.end, time.monotonic())
                    continue
                again = msgspec.structs.replace(one.generate, requests=(ids[choice],), emitted=(emitted[: begun.tokens],))
                self._client.generate(again, [flow.sinks[choice]])

        return await self._stream(request, flow, ids, start, name)

    async def _answer(
        self,
        request: web.Request,
        body: requests.Generation,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        prefix: str,
        echo: bool,
        make_whole: Any,
    ) -> web.StreamResponse:
        """Generate `n` continuations of each prompt, and answer whole or as a stream."""
        start = time.monotonic()
        each = choices(body)
        count = each * len(prompts)
        if count > self._most_choices:
            raise Refusal(
                f"prompts and n ask for {count} answers at once, this server takes {self._most_choices}: send several requests",
                "n",
                code="out_of_range",
            )
        stop, drawn, limit = stops(body), seeds(body, each), timeout(body, self._timeout)
        ids = self._client.new_ids(count)
        name = request_id(request) or f"{prefix}-{secrets.token_hex(12)}"
        chat = prefix == "chatcmpl"
        outline = Outline(
            head={
                "id": name,
                "object": "text_completion" if not chat else "chat.completion.chunk" if body.stream else "chat.completion",
                "created": int(time.time()),
                "model": self.served.name,
                "system_fingerprint": self._fingerprint,
            },
            chat=chat,
            each=each,
            choices=count,
            usage=body.stream_options is not None and body.stream_options.include_usage,
            top=bool(sampling.logprobs),
            echo=echo,
            scored=sampling.prompt_logprobs is not None,
        )
        notes = _encode(outline) if body.stream else b""

        def begin(sinks: Sequence[Any]) -> None:
            for place, prompt in enumerate(prompts):
                here = slice(place * each, (place + 1) * each)
                generate = Generate(
                    requests=ids[here],
                    seeds=drawn,
                    prompt=prompt,
                    sampling=sampling,
                    stop=stop,
                    include_stop=body.include_stop_str_in_output,
                    skip_special_tokens=body.skip_special_tokens,
                    want_prompt=echo,
                    tenant=tenant_of(request),
                    priority=body.priority,
                    deadline=None if limit is None else start + limit,
                    answer=name,
                    first_choice=place * each,
                    notes=notes,
                    trace=_trace_parent(request),
                )
                self._client.generate(generate, sinks[here])

        if body.stream:
            flow = Flow(outline, self._meters, Progress(count))
            return await self._stream(request, flow, ids, lambda: begin(flow.sinks), name)
        answer = Answer(count)
        whole = [Choice(index, answer, Timing(self._meters, start)) for index in range(count)]
        async with self._until_complete(answer, ids):
            begin(whole)
            await answer.all_done()
        counts = usage([(index // each, sink.finish) for index, sink in enumerate(whole)])
        return _json(make_whole(outline.head, whole, counts), {"x-request-id": name})

    async def _stream(
        self, request: web.Request, flow: "Flow", ids: Sequence[int], start: Callable[[], None], name: str
    ) -> web.StreamResponse:
        async with self._until_complete(flow.answer, ids):
            start()
            counts = flow.counts if flow.outline.usage else None
            return await stream_answer(request, flow.answer, flow.sinks, flow.shape, counts, {"x-request-id": name})

    @asynccontextmanager
    async def _until_complete(self, answer: Answer, ids: Sequence[int]) -> AsyncIterator[None]:
        """However this ends, nothing keeps running."""
        try:
            yield
        except asyncio.CancelledError:
            self._meters.disconnects.add()
            raise
        finally:
            if not answer.complete:
                # The client went away, or one of several choices failed: the others are of no use.
                self._client.abort(ids)

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.served.name:
            message = f"the model {name[:200]!r} does not exist: this server serves {self.served.name!r}"
            raise Refusal(message, "model", 404, "model_not_found")

    def _card(self) -> responses.Model:
        return responses.Model(self.served.name, self._created, max_model_len=self.served.context)


async def _body(request: web.Request) -> bytes:
    """The body as it was sent. Compressed ones are not unpacked: a small one could hold gigabytes."""
    if (coding := request.headers.get("Content-Encoding", "identity")) != "identity":
        raise Refusal(
            f"bodies with the Content-Encoding {coding[:40]!r} are not read: send it as it is", status=415, code="unsupported_encoding"
        )
    try:
        async with asyncio.timeout(BODY_TIMEOUT):
            return await request.read()
    except web.RequestPayloadError as error:
        raise Refusal(f"the body is broken off or malformed: {str(error)[:200]}", code="malformed_body") from None
    except TimeoutError:
        raise Refusal(f"the body did not come within {BODY_TIMEOUT:g} s", status=408, code="request_timeout") from None


def _json(body: object, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(body=_encode(body), content_type="application/json", headers=headers)
