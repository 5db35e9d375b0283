"""OpenAI's routes and vLLM's tokenizer routes: read a body, send it to the engine, answer.

body ─▶ decode ─▶ validate ─▶ Generate (one a prompt) ─▶ DirectClient ─▶ Choices ─▶ whole.py | stream.py
"""

import asyncio
import time
from collections.abc import Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import msgspec
from aiohttp import web

from headrace.client.direct import CallError, DirectClient
from headrace.engine.checkpoint.card import ModelFiles
from headrace.engine.messages.frontend import ChatPrompt, Generate, Prompt, TextPrompt
from headrace.engine.messages.openai import requests, responses
from headrace.engine.messages.sampling import Sampling
from headrace.server.meters import RequestMeters, Timing
from headrace.server.openai.choices import Answer, Choice, usage
from headrace.server.openai.errors import Refusal, decode
from headrace.server.openai.stream import Shape, StreamedChoice, stream_answer
from headrace.server.openai.validate import (
    chat_prompt,
    chat_sampling,
    choices,
    completion_prompts,
    completion_sampling,
    seeds,
    stops,
)
from headrace.server.openai.whole import chat_completion, completion

BODY_TIMEOUT = 60.0
"""Seconds in which a body must have come."""

_encode = msgspec.json.Encoder().encode
_chat = msgspec.json.Decoder(requests.Chat)
_completion = msgspec.json.Decoder(requests.Completion)
_tokenize = msgspec.json.Decoder(requests.TokenizeText)
_detokenize = msgspec.json.Decoder(requests.DetokenizeIds)


def engine_version() -> str:
    try:
        return version("headrace")
    except PackageNotFoundError:
        return "unknown"


class OpenAIRoutes:
    """The handlers."""

    def __init__(self, client: DirectClient, model: ModelFiles, meters: RequestMeters) -> None:
        self._client = client
        self._model = model
        self._meters = meters
        self._fingerprint = f"headrace-{engine_version()}"
        self._created = int(time.time())

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/v1/chat/completions", self.chat),
            web.post("/v1/completions", self.complete),
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
        """Generate `n` continuations of each prompt, and answer whole or as a stream. However this ends, nothing keeps running."""
        start = time.monotonic()
        each = choices(body)
        count = each * len(prompts)
        stop, drawn = stops(body), seeds(body, each)
        ids = self._client.new_ids(count)
        chat = prefix == "chatcmpl"
        head = {
            "id": f"{prefix}-{ids[0]:016x}",
            "object": "text_completion" if not chat else "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(time.time()),
            "model": self._model.name,
            "system_fingerprint": self._fingerprint,
        }
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        shape = Shape(head, chat, include_usage, bool(sampling.logprobs))
        answer = Answer(count)
        timings = [Timing(self._meters, start) for _ in ids]
        sinks: list[Any]
        if body.stream:
            scored = sampling.prompt_logprobs is not None
            sinks = [StreamedChoice(index, answer, timings[index], shape, echo, scored) for index in range(count)]
        else:
            sinks = [Choice(index, answer, timings[index]) for index in range(count)]

        def counts() -> responses.Usage:
            return usage([(index // each, sink.finish) for index, sink in enumerate(sinks)])

        headers = {"x-request-id": head["id"]}
        try:
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
                    priority=body.priority,
                )
                self._client.generate(generate, sinks[here])
            if body.stream:
                return await stream_answer(request, answer, sinks, shape, counts if include_usage else None, headers)
            await answer.all_done()
            return _json(make_whole(head, sinks, counts()), headers)
        except asyncio.CancelledError:
            self._meters.disconnects.add()
            raise
        finally:
            if not answer.complete:
                # The client went away, or one of several choices failed: the others are of no use.
                self._client.abort(ids)

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self._model.name:
            message = f"the model {name[:200]!r} does not exist: this server serves {self._model.name!r}"
            raise Refusal(message, "model", 404, "model_not_found")

    def _card(self) -> responses.Model:
        return responses.Model(self._model.name, self._created, max_model_len=self._model.context)


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
