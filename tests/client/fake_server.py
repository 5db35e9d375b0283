"""An OpenAI-compatible server for tests: one word is one token, and it misbehaves on demand.

It runs on a thread of its own with a port of its own. `Behaviour` says what it understands and how it fails; what it was
asked is in `requests`.
"""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

TEMPLATE_TOKENS = 10
MODEL = "fake-model"


@dataclass
class Behaviour:
    tokenize: str | None = "prompt"
    """Whose shape `/tokenize` has: "prompt", "content", or None for no such path."""
    takes_ids: bool = True
    takes_ignore_eos: bool = True
    takes_stream_options: bool = True
    line_end: bytes = b"\n"
    token_delay_s: float = 0.0
    first_delay_s: float = 0.0
    tokens_per_chunk: int = 1
    stops_after: int | None = None
    break_after: int | None = None
    """Close the connection after this many tokens."""
    end_without_done: bool = False
    error_after: int | None = None
    """Send an error event after this many tokens."""
    failures: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    """Answer the next generations with these statuses and headers."""
    busy_above: int | None = None
    """Answer 429 to requests for more tokens than this."""
    api_key: str | None = None
    cached: int | None = None
    models: dict[str, Any] | None = None
    """What `/v1/models` says instead."""
    health: tuple[int, dict[str, str]] = (200, {"status": "ok"})
    hang_up: bool = False
    """Close the connection after each stream, and say so in its header."""
    silent: bool = False
    """Accept and never answer."""


class FakeServer:
    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.requests: list[dict[str, Any]] = []
        """Bodies of all generation requests."""
        self.disconnects = threading.Semaphore(0)
        """Released for every client that goes away during its answer."""
        self.busy = threading.Semaphore(0)
        """Released when a long answer (more than 1,000 tokens) has begun."""
        self.port = 0
        self._words: dict[str, int] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def count(self, body: dict[str, Any]) -> int:
        if "messages" in body:
            return TEMPLATE_TOKENS + sum(len(str(message["content"]).split()) for message in body["messages"])
        prompt = body["prompt"]
        return len(prompt) if isinstance(prompt, list) else len(prompt.split())

    async def models(self, _: web.Request) -> web.Response:
        entry = {"id": MODEL, "object": "model", "created": 1, "owned_by": "tests"}
        return web.json_response(self.behaviour.models or {"object": "list", "data": [entry]})

    async def health(self, _: web.Request) -> web.Response:
        status, body = self.behaviour.health
        return web.json_response(body, status=status)

    async def tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        shape = self.behaviour.tokenize
        if shape is None:
            raise web.HTTPNotFound
        if shape == "content":
            words = body.get("content", "").split()
        elif "messages" in body:
            words = ["<template>"] * TEMPLATE_TOKENS + " ".join(message["content"] for message in body["messages"]).split()
        elif "prompt" in body:
            words = body["prompt"].split()
        else:
            return self.refuse(400, "prompt is missing")
        ids = [self._words.setdefault(word, len(self._words)) for word in words]
        return web.json_response({"tokens": ids} if shape == "content" else {"count": len(ids), "max_model_len": 4096, "tokens": ids})

    async def detokenize(self, request: web.Request) -> web.Response:
        names = list(self._words)
        return web.json_response({"prompt": " ".join(names[i] for i in (await request.json())["tokens"])})

    async def apply_template(self, request: web.Request) -> web.Response:
        messages = (await request.json())["messages"]
        return web.json_response({"prompt": "<t> " * TEMPLATE_TOKENS + messages[0]["content"]})

    def refuse(self, status: int, message: str, headers: dict[str, str] | None = None, param: str | None = None) -> web.Response:
        error = {"message": message, "type": "invalid_request_error", "code": f"code_{status}", "param": param}
        return web.json_response({"error": error}, status=status, headers=headers)

    async def generate(self, request: web.Request) -> web.StreamResponse:
        behaviour = self.behaviour
        body = await request.json()
        self.requests.append(body)
        if behaviour.silent:
            await asyncio.Event().wait()
        if behaviour.api_key and request.headers.get("Authorization") != f"Bearer {behaviour.api_key}":
            return self.refuse(401, "wrong key")
        if behaviour.failures:
            status, headers = behaviour.failures.pop(0)
            return self.refuse(status, f"refused with {status}", headers)
        if behaviour.busy_above is not None and (body.get("max_tokens") or 8) > behaviour.busy_above:
            return self.refuse(429, "refused with 429", {"Retry-After": "1"})
        if "ignore_eos" in body and not behaviour.takes_ignore_eos:
            return self.refuse(400, "unknown parameter ignore_eos", param="ignore_eos")
        if "stream_options" in body and not behaviour.takes_stream_options:
            return self.refuse(400, "unknown parameter stream_options", param="stream_options")
        if isinstance(body.get("prompt"), list) and not behaviour.takes_ids:
            return self.refuse(400, "prompt must be a string", param="prompt")
        if body.get("model") not in (None, MODEL):
            return self.refuse(404, f"no model {body['model']}", param="model")
        chat = "messages" in body
        total = body.get("max_tokens") or 8
        if behaviour.stops_after is not None:
            total = min(total, behaviour.stops_after)
        reason = "stop" if behaviour.stops_after == total else "length"
        usage: dict[str, Any] = {"prompt_tokens": self.count(body), "completion_tokens": total}
        usage["total_tokens"] = usage["prompt_tokens"] + total
        if behaviour.cached is not None:
            usage["prompt_tokens_details"] = {"cached_tokens": behaviour.cached}
        if not body.get("stream"):
            text = "".join(f" w{i}" for i in range(total))
            choice = {"index": 0, "finish_reason": reason, "logprobs": None}
            choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            return web.json_response(self.shell(chat, False) | {"choices": [choice], "usage": usage})
        return await self.stream(request, chat, total, reason, usage if "stream_options" in body else None)

    def shell(self, chat: bool, stream: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if stream else "chat.completion") if chat else "text_completion"
        return {"id": "req-1", "object": kind, "created": 1, "model": MODEL}

    async def stream(self, request: web.Request, chat: bool, total: int, reason: str, usage: dict[str, Any] | None) -> web.StreamResponse:
        behaviour, end = self.behaviour, self.behaviour.line_end
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        if self.behaviour.hang_up:
            response.force_close()
        await response.prepare(request)

        async def send(choices: list[dict[str, Any]], **more: Any) -> None:
            data = json.dumps(self.shell(chat, True) | {"choices": choices} | more).encode()
            await response.write(b"data: " + data + end + end)

        def choice(text: str, finish: str | None, role: bool = False) -> list[dict[str, Any]]:
            delta: dict[str, Any] = {"role": "assistant", "content": ""} if role else {"content": text} if text else {}
            return [{"index": 0, "finish_reason": finish, "logprobs": None} | ({"delta": delta} if chat else {"text": text})]

        if total > 1000:
            self.busy.release()
        try:
            if chat:
                await send(choice("", None, role=True))
            await asyncio.sleep(behaviour.first_delay_s)
            for first in range(0, total, behaviour.tokens_per_chunk):
                if first and behaviour.token_delay_s:
                    await asyncio.sleep(behaviour.token_delay_s)
                if first == behaviour.break_after:
                    assert request.transport is not None
                    request.transport.abort()
                    return response
                if first == behaviour.error_after:
                    await response.write(b'data: {"error":{"message":"the worker died","code":500}}' + end + end)
                    await response.write_eof()
                    return response
                last = min(first + behaviour.tokens_per_chunk, total)
                await send(choice("".join(f" w{i}" for i in range(first, last)), None))
            if behaviour.end_without_done:
                await response.write_eof()
                return response
            await send(choice("", reason))
            if usage is not None:
                await send([], usage=usage)
            await response.write(b"data: [DONE]" + end + end)
            await response.write_eof()
        except (ConnectionError, asyncio.CancelledError):
            self.disconnects.release()
            raise
        return response

    def app(self) -> web.Application:
        app = web.Application(client_max_size=32 << 20)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/health", self.health)
        app.router.add_post("/v1/completions", self.generate)
        app.router.add_post("/v1/chat/completions", self.generate)
        app.router.add_post("/tokenize", self.tokenize)
        app.router.add_post("/detokenize", self.detokenize)
        app.router.add_post("/apply-template", self.apply_template)
        return app


@contextmanager
def serving(behaviour: Behaviour | None = None) -> Iterator[FakeServer]:
    """A server that listens, until the block ends."""
    server = FakeServer(behaviour or Behaviour())
    ready, loops = threading.Event(), []
    stop: list[asyncio.Event] = []

    async def live() -> None:
        runner = web.AppRunner(server.app(), handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server.port = runner.addresses[0][1]
        loops.append(asyncio.get_running_loop())
        stop.append(asyncio.Event())
        ready.set()
        await stop[0].wait()
        await runner.cleanup()

    thread = threading.Thread(target=lambda: asyncio.run(live()), daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield server
    finally:
        loops[0].call_soon_threadsafe(stop[0].set)
        thread.join(10)
