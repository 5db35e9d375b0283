"""The client library: typed calls to a running server, over HTTP or straight to its tokenizers.

    from headrace.client import Client

    with Client("http://127.0.0.1:8000") as client:
        for chunk in client.chat_stream([{"role": "user", "content": "Why is the sky blue?"}]):
            print(chunk.choices[0].delta.content or "", end="")

`Client` is synchronous and `AsyncClient` is its twin for asyncio; both work with any OpenAI-compatible server. Everything they raise is a
`ClientError`. `DirectClient` speaks to a local engine over ZeroMQ, without HTTP. Importing this package loads neither torch nor aiohttp
nor ZeroMQ.
"""

from typing import TYPE_CHECKING, Any

from headrace.client.aio import AsyncClient, AsyncStream
from headrace.client.errors import (
    APIError,
    BadRequest,
    ClientError,
    Disconnected,
    NotFound,
    RateLimited,
    ServerError,
    Timeout,
    Unauthorized,
    Unavailable,
    Unreachable,
)
from headrace.client.sync import Client, Stream

if TYPE_CHECKING:
    from headrace.client.direct import DirectClient

__all__ = [
    "APIError",
    "AsyncClient",
    "AsyncStream",
    "BadRequest",
    "Client",
    "ClientError",
    "DirectClient",
    "Disconnected",
    "NotFound",
    "RateLimited",
    "ServerError",
    "Stream",
    "Timeout",
    "Unauthorized",
    "Unavailable",
    "Unreachable",
]


def __getattr__(name: str) -> Any:
    if name == "DirectClient":
        from headrace.client.direct import DirectClient

        return DirectClient
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
