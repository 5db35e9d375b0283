"""A tokenizer that says what the test tells it to, and the real server in front of it, all on the test's own event loop.

HTTP client ─▶ Server (real) ─▶ DirectClient (real) ─▶ ScriptedDesk (the test speaks)
                  └─ GetStatus ─▶ the test's mailbox in the supervisor's place
"""

import asyncio
import shutil
import tempfile
from pathlib import Path
from typing import TypeVar

import aiohttp
import zmq

from headrace.engine.actor import Desk, Mailbox, endpoint
from headrace.engine.checkpoint.card import ModelFiles
from headrace.engine.config import Config
from headrace.engine.messages.frontend import Accepted, Detokenize, Detokenized, End, Generate, Text, ToTokenizer
from headrace.engine.messages.lifecycle import EngineState, FromChild, GetStatus, PeerDied, Status
from headrace.engine.messages.wire import Message
from headrace.engine.names import SUPERVISOR, desk_name
from headrace.engine.process import EngineSpec, Process
from headrace.server.server import Server, build

M = TypeVar("M", bound=Message)
PATIENCE = 10.0
"""Seconds to wait for what must come."""

MODEL = ModelFiles(
    name="scripted",
    path="/nowhere",
    format="gguf",
    architecture="llama",
    context=1000,
    vocab_size=100,
    end_tokens=(2,),
    bos_token=None,
    weight_bytes=0,
)


def short_folder() -> Path:
    """A new folder whose name leaves room for a socket's, which may have 107 bytes in all."""
    return Path(tempfile.mkdtemp(prefix="hr-"))


def ended(request: int, reason: str = "stop", completion: int = 1, prompt: int = 5) -> End:
    return End(request, reason, None, prompt, completion, 0, 0.0)


class ScriptedDesk:
    """The desk of the tokenizer `name`: what comes is kept until the test looks at it."""

    def __init__(self, run_dir: Path, name: str = "tokenizer-0") -> None:
        self._context = zmq.Context()
        self._inbox: asyncio.Queue[tuple[bytes, Message]] = asyncio.Queue()
        self._desk = Desk(self._context, endpoint(run_dir, desk_name(name)), ToTokenizer)
        self._desk.open(lambda identity, message: self._inbox.put_nowait((identity, message)), lambda: None)
        self._frontend = b""

    async def next(self, kind: type[M]) -> M:
        """The next message, which must be a `kind`; answers go to who sent it."""
        self._frontend, message = await asyncio.wait_for(self._inbox.get(), PATIENCE)
        assert isinstance(message, kind), message
        return message

    def hears_nothing(self) -> bool:
        return self._inbox.empty()

    def send(self, *messages: Message) -> None:
        for message in messages:
            assert self._desk.send(self._frontend, message), "the frontend is gone"

    async def accept(self, prompt_tokens: int = 5, prompt_text: str | None = None) -> Generate:
        """Take the next request, all of its continuations."""
        generate = await self.next(Generate)
        self.send(*(Accepted(request, prompt_tokens, prompt_text) for request in generate.requests))
        return generate

    def say(self, request: int, text: str, tokens: list[int] | None = None, end: End | None = None) -> None:
        """One step: `tokens`, one when not given, became `text`."""
        tokens = [7] if tokens is None else tokens
        self.send(Text([request], [text], [len(tokens)], [end] if end else [], [], tokens))

    def close(self) -> None:
        """End like a process: when this returns nobody listens any more, and the address is a successor's to take."""
        self._desk.close()
        self._context.term()


class Stage:
    """The real server, scripted on both sides. `status` is what the supervisor says; None keeps it silent."""

    def __init__(self, state: str, settings: dict) -> None:
        self.run_dir = short_folder()
        config = Config(port=0, **settings)
        self.process = Process(self.run_dir, "server-0", 1, EngineSpec(config, MODEL))
        self.desks = [ScriptedDesk(self.run_dir, f"tokenizer-{place}") for place in range(config.tokenizers)]
        self.status: Status | None = Status(0, "ready", [], [], None)
        self.told: asyncio.Queue[Message] = asyncio.Queue()
        """What the server said to its supervisor, questions of status aside."""
        self._mailbox = Mailbox(self.process.context, self.process.address(SUPERVISOR), FromChild)
        self._mailbox.open(self)
        self._state = state
        self.server: Server
        self.http: aiohttp.ClientSession

    @property
    def desk(self) -> ScriptedDesk:
        return self.desks[0]

    async def open(self) -> None:
        self.server = await build(self.process)
        self.server.receive(EngineState(self._state))
        self.http = aiohttp.ClientSession(self.process.detail, timeout=aiohttp.ClientTimeout(total=PATIENCE))

    def receive(self, message: Message) -> None:
        if not isinstance(message, GetStatus):
            self.told.put_nowait(message)
        elif self.status:
            found = self.status
            self.server.receive(Status(message.call, found.state, found.children, found.series, found.progress))

    def settle(self) -> None: ...

    def post(self, path: str, **body) -> asyncio.Task[tuple[int, dict, aiohttp.ClientResponse]]:
        """Ask, in a task: (status, JSON body, response)."""

        async def ask():
            async with self.http.post(path, json=body) as response:
                return response.status, await response.json(), response

        return asyncio.create_task(ask())

    def complete(self, **body) -> asyncio.Task[tuple[int, dict, aiohttp.ClientResponse]]:
        return self.post("/v1/completions", **{"prompt": "x"} | body)

    def stream(self, **body) -> asyncio.Task[tuple[int, str, aiohttp.ClientResponse]]:
        """Ask for a stream, in a task: (status, everything that was sent, response)."""

        async def ask():
            async with self.http.post("/v1/completions", json={"prompt": "x", "stream": True} | body) as response:
                return response.status, await response.text(), response

        return asyncio.create_task(ask())

    def tokenizer_dies(self) -> None:
        """The first tokenizer; its successor stands where it stood."""
        self.desk.close()
        self.server.receive(PeerDied("tokenizer-0", 1))
        self.desks[0] = ScriptedDesk(self.run_dir)

    async def complete_and_finish(self) -> str:
        """One whole request, to see that the server still serves: its text."""
        answer = self.complete()
        (request,) = (await self.desk.accept()).requests
        self.desk.say(request, "fine", [7], ended(request))
        status, body, _ = await answer
        assert status == 200, body
        return body["choices"][0]["text"]

    async def delivered(self) -> None:
        """What the first desk said so far has reached the server: it answers in order, and here it answers once more."""
        call = self.post("/detokenize", tokens=[1])
        asked = await self.desk.next(Detokenize)
        self.desk.send(Detokenized(asked.call, "x"))
        assert (await call)[0] == 200

    async def connect(self, limit: int = 2**16) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A bare connection to the server, which reads ahead by no more than `limit` bytes."""
        host, port = self.process.detail.removeprefix("http://").split(":")
        return await asyncio.open_connection(host, int(port), limit=limit)

    async def raw_status(self, head: bytes) -> int:
        """The status that these bytes are answered with."""
        reader, writer = await self.connect()
        writer.write(head)
        line = await asyncio.wait_for(reader.readline(), PATIENCE)
        writer.close()
        return int(line.split()[1])

    async def close(self) -> None:
        await self.http.close()
        await self.server.close()
        self._mailbox.close()
        for desk in self.desks:
            desk.close()
        self.process.post.close()
        self.process.context.destroy(linger=0)
        shutil.rmtree(self.run_dir)
