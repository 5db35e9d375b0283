"""Many streams at once from one test, counted as they come: the load under which things are killed.

Streams ── openai's client, a task each ──▶ engine
   └── until(n): n pieces of text have come, over all streams
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Self

import openai

from headrace.client import AsyncClient


@dataclass
class Got:
    """What one stream gave, in full."""

    text: str = ""
    pieces: int = 0
    finish_reason: str | None = None
    completion_tokens: int | None = None
    logprobs: list[tuple[str, float]] = field(default_factory=list)
    error: Exception | None = None

    def difference(self, other: "Got") -> str:
        """What differs first, "" when nothing does. Pieces may be cut otherwise; all else must be equal."""
        if self.error or other.error:
            return f"errors {self.error!r}, {other.error!r}"
        if self.text != other.text:
            place = next((at for at, pair in enumerate(zip(self.text, other.text, strict=False)) if pair[0] != pair[1]), None)
            return f"text of {len(self.text)} and {len(other.text)} characters, from character {place} on"
        if self.logprobs != other.logprobs:
            place = next((at for at, pair in enumerate(zip(self.logprobs, other.logprobs, strict=False)) if pair[0] != pair[1]), None)
            return f"logprobs of {len(self.logprobs)} and {len(other.logprobs)} tokens, from token {place} on"
        ends = [(one.finish_reason, one.completion_tokens) for one in (self, other)]
        return "" if ends[0] == ends[1] else f"ends {ends}"


def differences(some: list[Got], others: list[Got]) -> dict[int, str]:
    """What differs, by place; empty when nothing does."""
    found = {place: one.difference(other) for place, (one, other) in enumerate(zip(some, others, strict=True))}
    return {place: what for place, what in found.items() if what}


class Streams:
    """A task for each of `requests`, which are arguments of `completions.create` or, with messages, of `chat.completions.create`.

    `ours` takes `headrace.client` instead of `openai`; its chunks have the same fields.
    """

    def __init__(self, url: str, model: str, requests: list[dict[str, Any]], ours: bool = False) -> None:
        self.got = [Got() for _ in requests]
        self._url = url
        self._model = model
        self._requests = requests
        self._ours = ours
        self._pieces = 0
        self._news = asyncio.Event()

    async def __aenter__(self) -> Self:
        if self._ours:
            self._client: Any = AsyncClient(self._url, timeout=60)
        else:
            self._client = openai.AsyncOpenAI(base_url=f"{self._url}/v1", api_key="none", max_retries=0, timeout=60)
        self._tasks = [asyncio.create_task(self._run(*pair)) for pair in zip(self._requests, self.got, strict=True)]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.close()

    async def until(self, pieces: int) -> None:
        """Wait for so many pieces of text, over all streams."""
        while self._pieces < pieces:
            assert not all(task.done() for task in self._tasks), f"all streams ended with {self._pieces} pieces: {self.got[0]}"
            self._news.clear()
            await asyncio.wait_for(self._news.wait(), 30)

    async def ended(self) -> list[Got]:
        """Wait for the end of every stream."""
        await asyncio.wait_for(asyncio.gather(*self._tasks), 60)
        return self.got

    async def _open(self, request: dict[str, Any]) -> AsyncIterator[Any]:
        common = {"model": self._model, "stream_options": {"include_usage": True}} | request
        if not self._ours:
            create = self._client.chat.completions.create if "messages" in request else self._client.completions.create
            return await create(stream=True, **common)
        common |= common.pop("extra_body", {})
        if "messages" in request:
            return await self._client.chat_stream(common.pop("messages"), **common)
        return await self._client.complete_stream(common.pop("prompt"), **common)

    async def _run(self, request: dict[str, Any], got: Got) -> None:
        try:
            async for chunk in await self._open(request):
                if chunk.usage:
                    got.completion_tokens = chunk.usage.completion_tokens
                for choice in chunk.choices:
                    got.finish_reason = choice.finish_reason or got.finish_reason
                    if text := (choice.delta.content if "messages" in request else choice.text):
                        got.text += text
                        got.pieces += 1
                        self._pieces += 1
                    if choice.logprobs and "messages" in request:
                        got.logprobs += [(one.token, one.logprob) for one in choice.logprobs.content]
                    elif choice.logprobs:
                        got.logprobs += zip(choice.logprobs.tokens, choice.logprobs.token_logprobs, strict=True)
                self._news.set()
        except Exception as error:  # what the client's transport lets through, such as a connection that breaks within a body
            got.error = error
        finally:
            self._news.set()


async def run(url: str, model: str, requests: list[dict[str, Any]], ours: bool = False) -> list[Got]:
    """All of `requests` at once, to their ends."""
    async with Streams(url, model, requests, ours) as streams:
        return await streams.ended()
