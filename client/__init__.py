"""The client library: typed calls to a running server, over HTTP or straight to its tokenizers.

    from headrace.client import Client

    with Client("http://127.0.0.1:8000") as client:
        for chunk in client.chat_stream([{"role": "user", "content": "Why is the sky blue?"}]):
            print(chunk.choices[0].delta.content or "", end="")

`Client` is synchronous and `AsyncClient` is its twin for asyncio; both work with any OpenAI-compatible server. Everything they raise is a
`ClientError`. `DirectClient` speaks to a local engine over ZeroMQ, without HTTP, and `RemoteClient` the same to one on another machine that
listens for it (`headrace serve --listen tcp://HOST:PORT --keys DIR`):

    client = await RemoteClient.connect("tcp://10.0.0.1:5700", "alice.key_secret", "server.key")
    async for event in client.stream(TextPrompt("Why is the sky blue?"), Sampling(max_tokens=100)):
        print(event.text if isinstance(event, Piece) else "", end="")

Importing this package loads neither torch nor aiohttp nor ZeroMQ.
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
    from headrace.client.remote import RemoteClient

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
    "RemoteClient",
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
    if name == "RemoteClient":
        from headrace.client.remote import RemoteClient

        return RemoteClient
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
