"""ZeroMQ over a network: encrypted by CURVE, and only between those who have shown their keys (rfc.zeromq.org/spec/26, 27).

The server's socket has the engine's secret key. A client must know its public half, and show a key of its own that the `Gatekeeper` knows;
libzmq asks it before a connection brings its first message, and there is no connection without an answer. So nothing that a stranger
sends is ever decoded. Each message carries the key of its sender (`GuardedDesk`).

    client ── HELLO, INITIATE ──▶ libzmq ── ZAP: this key? ──▶ Gatekeeper ── 200 | 400 ──▶ libzmq ── messages ──▶ GuardedDesk

A `Monitor` tells what becomes of connections. Both ends ask each other for a sign of life, so that a dead machine is noticed.
"""

from collections.abc import Callable, Container
from typing import NamedTuple

import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from headrace.engine.actor import Desk, Reader
from headrace.engine.keys import Pair
from headrace.engine.messages.frontend import Dismissed
from headrace.engine.messages.wire import Message
from headrace.engine.metrics import Counter

DOMAIN = b"headrace"
GATE = "inproc://zeromq.zap.01"
"""Where libzmq asks whom to let in; one for a context."""

HEARTBEAT_MS, SILENCE_MS = 1000, 5000
"""How often the other end is asked for a sign of life, and how long it may give none."""
HANDSHAKE_MS = 10_000
"""How long a connection may take to show its key."""
RECONNECT_MS, SLOWEST_RECONNECT_MS = 100, 1000

LARGEST_GUEST_FRAME = 8 << 20
"""Bytes of a message from another machine, as of a request's body over HTTP."""
GUEST_MESSAGES = 100
"""Messages of one client that are taken before they are read; the rest waits on its own machine."""

IDENTITY_BYTES = 16
"""Least length of a client's identity. Who had another's could take its answers: they are drawn at random, and travel encrypted."""

FAILED = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH


def _lively(socket: zmq.Socket, address: str) -> None:
    socket.setsockopt(zmq.IPV6, int("[" in address))
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, SILENCE_MS)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)


def secure_client(socket: zmq.Socket, address: str, pair: Pair, server: bytes) -> None:
    """Let `socket` speak to nobody but the owner of the public key `server`, as the owner of `pair`."""
    socket.curve_publickey, socket.curve_secretkey, socket.curve_serverkey = pair.public, pair.secret, server
    socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, SLOWEST_RECONNECT_MS)
    _lively(socket, address)


class Monitor:
    """Calls `on_event` with (event, value) for those of `events` that happen to the connections of `socket`."""

    def __init__(self, socket: zmq.Socket, events: int, on_event: Callable[[int, int], None]) -> None:
        self._watched = socket

        def deliver(frames: list[bytes]) -> None:
            found = parse_monitor_message(frames)
            on_event(found["event"], found["value"])

        self._reader = Reader(socket.get_monitor_socket(events), deliver)

    def close(self) -> None:
        """To be called before the socket is closed."""
        # In this order: libzmq would wait for a reader that is gone.
        self._watched.disable_monitor()
        self._reader.close()


class Gatekeeper:
    """Tells libzmq which public keys to let in. Whatever it does not understand stays outside."""

    def __init__(self, context: zmq.Context, authorized: Container[bytes]) -> None:
        self._authorized = authorized
        self._socket = context.socket(zmq.REP)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(GATE)
        self._reader: Reader | None = None

    def open(self) -> None:
        """Start to answer. Who comes before waits."""
        self._reader = Reader(self._socket, self._answer)

    def close(self) -> None:
        if self._reader:
            self._reader.close()
        else:
            self._socket.close()

    def _answer(self, frames: list[bytes]) -> None:
        version, request, domain, _, _, mechanism, *credentials = frames
        key = z85.encode(credentials[0]) if mechanism == b"CURVE" and len(credentials) == 1 else b""
        if version == b"1.0" and domain == DOMAIN and key and key in self._authorized:
            answer = [b"200", b"OK", key, b""]
        else:
            answer = [b"400", b"this key is not among those that may connect", b"", b""]
        self._socket.send_multipart([b"1.0", request, *answer])


class Guest(NamedTuple):
    """A client on another machine."""

    identity: bytes
    key: str
    """Its public key, in Z85."""


class GuardedDesk(Desk):
    """A desk at a `tcp://` address for clients whose public keys are in `authorized`, each known by its key.

    `rejected` counts messages that are none, `refused` connections that came to nothing, or nearly all of them. One for a context.
    Raises `zmq.ZMQError`.
    """

    def __init__(
        self,
        context: zmq.Context,
        address: str,
        union: object,
        pair: Pair,
        authorized: Container[bytes],
        rejected: Counter,
        refused: Counter,
    ) -> None:
        self._authorized = authorized
        self._refused = refused
        self._pair = pair
        self._gate = Gatekeeper(context, authorized)
        try:
            super().__init__(context, address, union, rejected, lambda socket: self._secure(socket, address))
        except zmq.ZMQError:
            self._gate.close()
            raise
        self._monitor: Monitor | None = None
        self._strangers: set[int] = set()
        """Descriptors of connections since the last one was let in."""
        self._failed = 0
        """Those of them that were counted, and whose end is still to be told."""

    def _secure(self, socket: zmq.Socket, address: str) -> None:
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.curve_publickey, socket.curve_secretkey = self._pair
        # With no gatekeeper there, nobody is let in.
        socket.setsockopt(zmq.ZAP_DOMAIN, DOMAIN)
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        socket.setsockopt(zmq.MAXMSGSIZE, LARGEST_GUEST_FRAME)
        socket.setsockopt(zmq.RCVHWM, GUEST_MESSAGES)
        _lively(socket, address)

    def receive_guests(self, receive: Callable[[Guest, Message], None], settle: Callable[[], None]) -> None:
        """Deliver (who sent it, message). Instead of `open`."""

        def deliver(frames: list[zmq.Frame]) -> None:
            identity, key = frames[0].bytes, str(frames[-1].get("User-Id"))
            if len(identity) < IDENTITY_BYTES:
                self._inbox.rejected.add()
            elif key.encode() not in self._authorized:
                # It was taken from the folder while its owner was connected.
                self._inbox.rejected.add()
                self.send(identity, Dismissed())
            elif (message := self._inbox.decode([frame.bytes for frame in frames])) is not None:
                receive(Guest(identity, key), message)

        self._gate.open()
        events = zmq.EVENT_ACCEPTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | FAILED | zmq.EVENT_DISCONNECTED
        self._monitor = Monitor(self._socket, events, self._count)
        self._reader = Reader(self._socket, deliver, settle, copy=False)

    def _count(self, event: int, descriptor: int) -> None:
        """Count connections that came to nothing. Of some libzmq says so, of others only that they came and went before any was let in."""
        if event & FAILED:
            self._refused.add()
            self._failed += 1
        elif event == zmq.EVENT_ACCEPTED:
            self._strangers.add(descriptor)
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            # Which of them it was is not told.
            self._strangers.clear()
            self._failed = 0
        elif descriptor in self._strangers:
            self._strangers.discard(descriptor)
            if self._failed:
                self._failed -= 1
            else:
                self._refused.add()

    def close(self) -> None:
        if self._monitor:
            self._monitor.close()
        super().close()
        self._gate.close()
