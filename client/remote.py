"""The direct client from another machine: `DirectClient` over TCP, encrypted, with keys in the place of a run directory.

    client = await RemoteClient.connect("tcp://10.0.0.1:5700", "alice.key_secret", "server.key")
    async for event in client.stream(TextPrompt("Why is the sky blue?"), Sampling(max_tokens=100)): …

The desk at that address tells where the others are. A connection that ends, because its tokenizer died or is not heard of any more, is
made anew, and what was under way on it is sent again with the tokens it has, to the same desk: whether its tokenizer is dead cannot be
told from here, and two must not have one request. What no desk is there for within `patience` seconds fails.
"""

import asyncio
import secrets
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import msgspec
import zmq

from headrace.client.direct import Call, CallError, DirectClient
from headrace.client.errors import ClientError, Unauthorized, Unavailable, Unreachable
from headrace.engine.actor import Visit
from headrace.engine.curve import IDENTITY_BYTES, Monitor, secure_client
from headrace.engine.errors import UserError
from headrace.engine.keys import Pair, check_curve, read_pair, read_public
from headrace.engine.messages.frontend import CallFailed, Dismissed, Failed, Generate, ListDesks, ToGuest
from headrace.engine.names import LISTEN, host_of, port_of

EVENTS = zmq.EVENT_CONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_DISCONNECTED

RETRY_S = 1.0
"""After so long it is tried again where nobody was, or nobody let us in."""


class _Line:
    """What is known of the connection to one desk."""

    def __init__(self) -> None:
        self.monitor: Monitor | None = None
        self.up = False
        self.answered = False
        """Something listens there, whatever it may be."""
        self.timer: asyncio.TimerHandle | None = None
        """Runs while the connection is not up."""
        self.trouble: CallFailed | None = None
        """Why nothing can be sent, once it has lasted too long."""

    def end(self) -> None:
        """To be called before the connection's socket is closed."""
        if self.monitor:
            self.monitor.close()
            self.monitor = None
        if self.timer:
            self.timer.cancel()


class RemoteClient(DirectClient):
    """Talks to the engine that listens at `address`. Made by `connect`; needs a running event loop."""

    def __init__(self, address: str, pair: Pair, server: bytes, patience: float) -> None:
        self._pair = pair
        self._server = server
        self._patience = patience
        self._lines: dict[str, _Line] = {}
        super().__init__(Path(), [address])

    @classmethod
    async def connect(cls, address: str, certificate: str | Path, server_key: str | Path, patience: float = 10.0) -> Self:
        """A client of the engine at `address` ("tcp://HOST:PORT"). `certificate` is the client's file NAME.key_secret, `server_key` the
        engine's server.key. The engine may stay away for `patience` seconds, now and later.

        Raises `Unauthorized` when the engine does not know the key, `Unreachable` when it is not there or is another one, `Unavailable`
        while it starts, and `ClientError` when the files or the address cannot be used.
        """
        if not LISTEN.fullmatch(address):
            raise ClientError(f"{address} is no address: write tcp://HOST:PORT, as in the engine's --listen")
        try:
            check_curve()
            client = cls(address, read_pair(Path(certificate)), read_public(Path(server_key)), patience)
        except UserError as error:
            raise ClientError(str(error)) from None
        except zmq.ZMQError as error:
            raise ClientError(f"{address} is no address that can be connected to ({error.strerror})") from None
        try:
            ports = (await client._ask(ListDesks(client._new_id()))).ports
        except CallError as error:
            client.close()
            failure = error.failure
            if failure.status == 401:
                raise Unauthorized(failure.status, failure.message, failure.code) from None
            if failure.code == "starting":
                raise Unavailable(failure.status, failure.message, failure.code, retry_after=1.0) from None
            raise Unreachable(failure.message) from None
        except BaseException:
            client.close()
            raise
        # Where a port is forwarded by somebody the others cannot be told from here: that one does.
        if port_of(address) in ports:
            for port in ports:
                client._add(f"{host_of(address)}:{port}")
        return client

    def close(self) -> None:
        for line in self._lines.values():
            line.end()
        super().close()

    def _add(self, address: str) -> None:
        if address not in self._visits:
            self._load[address] = 0
            self._visits[address] = self._visit(address)

    def _visit(self, name: str) -> Visit:
        """A new connection to the desk at the address `name`."""
        before, line = self._lines.get(name), _Line()
        self._lines[name] = line
        if before and before.trouble:
            line.trouble = before.trouble
        else:
            line.timer = asyncio.get_running_loop().call_later(self._patience, self._give_up, name)

        def secure(socket: zmq.Socket) -> None:
            secure_client(socket, name, self._pair, self._server)
            line.monitor = Monitor(socket, EVENTS, lambda event, value: self._happened(name, event))

        # A name for each connection: what the engine still says to the one before must not come to this one.
        visit = Visit(self._context, name, secrets.token_bytes(IDENTITY_BYTES), ToGuest, secure)
        visit.open(lambda message: self._dismissed(name) if isinstance(message, Dismissed) else self._receive(message))
        return visit

    def _hang_up(self, name: str) -> None:
        self._lines[name].end()
        super()._hang_up(name)

    def _least_loaded(self) -> str:
        up = [name for name, line in self._lines.items() if line.up]
        return min(up or [name for name, line in self._lines.items() if not line.trouble] or self._load, key=self._load.__getitem__)

    def _submit(self, desk: str, generate: Generate) -> None:
        if trouble := self._lines[desk].trouble:
            self._fail_requests(generate.requests, trouble)
            return
        if generate.deadline is not None:
            generate = msgspec.structs.replace(generate, deadline=max(0.0, generate.deadline - time.monotonic()))
        super()._submit(desk, generate)

    def _send_call(self, call: Call) -> None:
        if trouble := self._lines[call.desk].trouble:
            if not call.future.done():
                call.future.set_exception(CallError(trouble))
        else:
            super()._send_call(call)

    def _happened(self, name: str, event: int) -> None:
        line = self._lines[name]
        if event == zmq.EVENT_CONNECTED:
            line.answered = True
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            line.up, line.trouble = True, None
            if line.timer:
                line.timer.cancel()
        elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            self._dismissed(name)
        elif event == zmq.EVENT_DISCONNECTED and line.up:
            self._send_again(name, [name])

    def _dismissed(self, name: str) -> None:
        self._fail(name, 401, "unauthorized", f"{name} does not let this key in: its public half belongs into the engine's clients/")

    def _give_up(self, name: str) -> None:
        """The desk was not there for too long."""
        if self._lines[name].answered:
            what = f"{name} is there, but does not prove that it has the server key that was given: is it another engine's?"
        else:
            what = f"{name} cannot be reached: is the engine running, with --listen and this port?"
        self._fail(name, 503, "unreachable", what)

    def _fail(self, name: str, status: int, code: str, message: str) -> None:
        """Fail what waits for a desk, and what is asked of it until it is there. It is tried again from time to time."""
        self._hang_up(name)  # With what was to be sent.
        line = self._lines[name]
        line.up, line.trouble = False, CallFailed(0, status, code, message)
        line.timer = asyncio.get_running_loop().call_later(RETRY_S, self._try_again, name)
        for call in self._calls.values():
            if call.desk == name:
                self._send_call(call)
        self._fail_requests([request for request, live in self._live.items() if live.desk == name], line.trouble)

    def _fail_requests(self, requests: Iterable[int], trouble: CallFailed) -> None:
        for request in requests:
            if live := self._forget(request):
                live.sink.failed(Failed(request, trouble.status, trouble.code, trouble.message, retry_after=RETRY_S))

    def _try_again(self, name: str) -> None:
        self._visits[name] = self._visit(name)
