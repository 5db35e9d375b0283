"""The actor framework: one mailbox a process, one message at a time.

An `Actor` is any object with two methods. `receive` is called for each message; `settle` once the mailbox is empty, which is where
work that pays by the batch belongs (planning a step, flushing columns). Both run on the process's event loop and must not block.
An exception in either ends the process: its supervisor sees the death and decides.

    peers ── PUSH ──▶ [ mailbox: PULL ] ─▶ receive, receive, …, settle
    actor ── send(address, message) ──▶ PUSH ──▶ the mailbox of that name

Frontends come and go without being children of the supervisor, so they meet a tokenizer at a `Desk` (ROUTER), which knows them by identity
and tells when one is gone; `Visit` (DEALER) is the other end of it. Between machines both are secured by `engine.curve`.

ZeroMQ sockets are read by their file descriptor, until empty at each wake-up: one callback for a burst of messages, not a future for each.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import zmq

from headrace.engine.messages.wire import BadFrame, Codec, Message, encode
from headrace.engine.metrics import Counter

HIGH_WATER_MARK = 100_000
"""Messages that may queue for one peer. A peer this far behind is dead or stuck; its supervisor will find out."""

LARGEST_FRAME = 256 << 20
"""Bytes of a message; ZeroMQ hangs up on a peer that announces a larger one, before any memory is taken for it. The largest that is sent is
that with the scores of a long prompt."""

BURST = 256
"""Messages handled before other callbacks of the loop get their turn."""

POLLIN = int(zmq.POLLIN)
"""As a plain number: flags of an enumeration are made anew by every operation on them."""

CRASH = "headrace_crash"
"""Marks what an event loop's exception handler is told when an actor failed."""


Secure = Callable[[zmq.Socket], None]


class Actor(Protocol):
    def receive(self, message: Message) -> None:
        """Handle one message."""
        ...

    def settle(self) -> None:
        """The mailbox is empty: do what was left for the end of the burst."""
        ...


def endpoint(run_dir: Path, name: str) -> str:
    """Where the process `name` of the engine in `run_dir` listens."""
    return f"ipc://{run_dir}/{name}"


def open_socket(context: zmq.Context, kind: int) -> zmq.Socket:
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
    socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
    socket.setsockopt(zmq.MAXMSGSIZE, LARGEST_FRAME)
    return socket


class Inbox:
    """Turns what a socket brings into messages of `union`. Whatever is none is counted in `rejected` and dropped."""

    def __init__(self, union: object, frames: int, rejected: Counter | None) -> None:
        self.rejected = rejected or Counter()
        self._codec = Codec(union)
        self._frames = frames

    def decode(self, frames: list[bytes]) -> Message | None:
        """The message, which is the last of so many frames; None for anything else."""
        if len(frames) == self._frames:
            try:
                return self._codec.decode(frames[-1])
            except BadFrame:
                pass
        self.rejected.add()
        return None


class Reader:
    """Calls `on_frames` for every message of a socket and `on_empty` after each burst, from the event loop."""

    def __init__(
        self, socket: zmq.Socket, on_frames: Callable[[list[Any]], None], on_empty: Callable[[], None] = lambda: None, copy: bool = True
    ) -> None:
        """Frames come as bytes, or with `copy` False as `zmq.Frame`s, which know who sent them."""
        self._socket = socket
        self._copy = copy
        self._on_frames = on_frames
        self._on_empty = on_empty
        self._loop = asyncio.get_running_loop()
        self._pending = False
        self._loop.add_reader(socket.getsockopt(zmq.FD), self._drain)
        self.recheck()

    def recheck(self) -> None:
        """The descriptor is edge-triggered and shared by both directions: after a send, what came meanwhile must be looked for."""
        if not self._pending and self._has_message():
            self._pending = True
            self._loop.call_soon(self._drain)

    def _has_message(self) -> bool:
        socket = self._socket
        return not socket.closed and bool(socket.getsockopt(zmq.EVENTS) & POLLIN)

    def close(self) -> None:
        if not self._socket.closed:
            self._loop.remove_reader(self._socket.getsockopt(zmq.FD))
            self._socket.close()

    def _drain(self) -> None:
        try:
            self._handle_burst()
        except Exception as error:
            # Not just any callback has failed but an actor, and its state cannot be trusted any more: see `engine.process`.
            self._loop.call_exception_handler({"message": "the actor failed", "exception": error, CRASH: True})

    def _handle_burst(self) -> None:
        self._pending = False
        handled = 0
        # Asked before each message: to be told by an exception that there is none costs three times as much. It may still come, where
        # a peer's death takes back what was there a moment ago.
        while self._has_message():
            if handled == BURST:
                self._pending = True
                self._loop.call_soon(self._drain)
                break
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK, self._copy)
            except zmq.Again:
                continue
            self._on_frames(frames)
            handled += 1
        if handled:
            self._on_empty()


class Mailbox:
    """The inbox of an actor: a PULL socket bound under the actor's name. What is no message of `union` is counted and dropped."""

    def __init__(self, context: zmq.Context, address: str, union: object, rejected: Counter | None = None) -> None:
        self._inbox = Inbox(union, 1, rejected)
        self._socket = open_socket(context, zmq.PULL)
        self._socket.bind(address)
        self._reader: Reader | None = None

    @property
    def rejected(self) -> Counter:
        return self._inbox.rejected

    def open(self, actor: Actor) -> None:
        """Start to deliver. Messages that came before are waiting."""

        def deliver(frames: list[bytes]) -> None:
            message = self._inbox.decode(frames)
            if message is not None:
                actor.receive(message)

        self._reader = Reader(self._socket, deliver, actor.settle)

    def close(self) -> None:
        if self._reader:
            self._reader.close()
        else:
            self._socket.close()


class Outbox:
    """Messages to one peer's mailbox. Connects at once or as soon as the peer is there; what is sent before waits."""

    def __init__(self, context: zmq.Context, address: str) -> None:
        self._socket = open_socket(context, zmq.PUSH)
        # A peer that died and returns binds the same address within moments; reconnect about as fast.
        self._socket.setsockopt(zmq.RECONNECT_IVL, 20)
        self._socket.connect(address)

    def send(self, message: Message) -> bool:
        """False when the peer is so far behind that its queue is full; the message is then not sent."""
        try:
            self._socket.send(encode(message), zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def close(self) -> None:
        self._socket.close()


class Post:
    """Outboxes by name, opened on first use."""

    def __init__(self, context: zmq.Context, run_dir: Path) -> None:
        self._context = context
        self._run_dir = run_dir
        self._outboxes: dict[str, Outbox] = {}

    def send(self, to: str, message: Message) -> bool:
        """Send to the process named `to`; see `Outbox.send`."""
        outbox = self._outboxes.get(to)
        if outbox is None:
            outbox = self._outboxes[to] = Outbox(self._context, endpoint(self._run_dir, to))
        return outbox.send(message)

    def forget(self, to: str) -> None:
        """Drop what waits for `to`, which died. A message may still slip through to its successor, who knows it by its epoch or id."""
        if outbox := self._outboxes.pop(to, None):
            outbox.close()

    def close(self) -> None:
        for name in list(self._outboxes):
            self.forget(name)


class Desk:
    """Where frontends are received: a ROUTER that knows each by its identity. `secure` gets the socket before it is bound."""

    def __init__(
        self, context: zmq.Context, address: str, union: object, rejected: Counter | None = None, secure: Secure | None = None
    ) -> None:
        self._inbox = Inbox(union, 2, rejected)
        self._socket = open_socket(context, zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        # A frontend that reconnects under its old identity takes over from its own dead connection.
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        if secure:
            secure(self._socket)
        try:
            self._socket.bind(address)
        except zmq.ZMQError:
            self._socket.close()
            raise
        self._reader: Reader | None = None

    @property
    def address(self) -> str:
        """Where it listens, with the port that it got."""
        return self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def open(self, receive: Callable[[bytes, Message], None], settle: Callable[[], None]) -> None:
        """Deliver (identity of the frontend, message)."""

        def deliver(frames: list[bytes]) -> None:
            message = self._inbox.decode(frames)
            if message is not None:
                receive(frames[0], message)

        self._reader = Reader(self._socket, deliver, settle)

    def send(self, identity: bytes, message: Message) -> bool:
        """False when the frontend is gone or does not read."""
        try:
            self._socket.send_multipart([identity, encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        finally:
            # Where it failed too: what another frontend said meanwhile would lie there until somebody else says something.
            if self._reader:
                self._reader.recheck()
        return True

    def close(self) -> None:
        if self._reader:
            self._reader.close()
        else:
            self._socket.close()


class Visit:
    """A frontend's connection to one desk: a DEALER. `secure` gets the socket before it is connected."""

    def __init__(self, context: zmq.Context, address: str, identity: bytes, union: object, secure: Secure | None = None) -> None:
        self._inbox = Inbox(union, 1, None)
        self._socket = open_socket(context, zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, identity)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 20)
        if secure:
            secure(self._socket)
        self._socket.connect(address)
        self._reader: Reader | None = None

    def open(self, receive: Callable[[Message], None], settle: Callable[[], None] = lambda: None) -> None:
        """Deliver what the desk sends."""

        def deliver(frames: list[bytes]) -> None:
            message = self._inbox.decode(frames)
            if message is not None:
                receive(message)

        self._reader = Reader(self._socket, deliver, settle)

    def send(self, message: Message) -> bool:
        """False when the desk is so far behind that the queue is full."""
        try:
            self._socket.send(encode(message), zmq.NOBLOCK)
        except zmq.Again:
            return False
        finally:
            if self._reader:
                self._reader.recheck()
        return True

    def close(self, linger_ms: int = 0) -> None:
        """Hang up; what was sent last has `linger_ms` to leave."""
        if not self._socket.closed:
            self._socket.setsockopt(zmq.LINGER, linger_ms)
        if self._reader:
            self._reader.close()
        else:
            self._socket.close()
