"""Where a tokenizer receives clients on other machines: a desk on the network, beside the one in the engine's run directory.

    guest ── Generate, … ──▶ desk (CURVE) ─▶ a tenant by its key, deadlines by this machine's clock ─▶ TokenizerActor

Each tokenizer has a port of its own, the same in all of its lives; a client asks any of them for those of all (`ListDesks`). Where ports
are chosen freely they are written into the run directory: `tokenizer-0.port`.
"""

import asyncio
import errno
import logging
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import zmq

from headrace.engine.curve import GuardedDesk, Guest
from headrace.engine.errors import UserError
from headrace.engine.keys import Authorized, check_curve, read_server
from headrace.engine.messages.frontend import CallFailed, Desks, FromGuest, Generate, ListDesks, Recall
from headrace.engine.messages.wire import Message
from headrace.engine.metrics import REJECTED_CONNECTIONS, REJECTED_CONNECTIONS_HELP
from headrace.engine.names import host_of, port_of, tokenizer_names
from headrace.engine.process import Process

log = logging.getLogger(__name__)

TAKEN_S, LOOK_S = 5.0, 0.05
"""How long a port may be somebody else's before that is an error, and how often it is tried: nothing tells when it is free."""


def tenant_of(guest: Guest) -> str:
    """Whom its requests are counted for. No API key makes such a name."""
    return f"curve:{guest.key}"


class Guests:
    """The guests of one tokenizer. `open` before use."""

    def __init__(self, process: Process, desk: GuardedDesk) -> None:
        self._process = process
        self._desk = desk

    def open(self, receive: Callable[[Guest, Message], None], settle: Callable[[], None]) -> None:
        """Deliver (who sent it, message), as if the guest were here."""

        def deliver(guest: Guest, message: Message) -> None:
            match message:
                case ListDesks(call=call):
                    self.send(guest, self._desks(call))
                    return
                case Generate(deadline=deadline):
                    here = None if deadline is None else time.monotonic() + deadline
                    message = msgspec.structs.replace(message, tenant=tenant_of(guest), deadline=here)
                case Recall():
                    message = msgspec.structs.replace(message, tenant=tenant_of(guest))
            receive(guest, message)

        self._desk.receive_guests(deliver, settle)

    def send(self, guest: Guest, message: Message) -> bool:
        """False when the guest is gone or does not read."""
        return self._desk.send(guest.identity, message)

    def close(self) -> None:
        self._desk.close()

    def _desks(self, call: int) -> Desks | CallFailed:
        ports = [_port(self._process, name) for name in tokenizer_names(self._process.config)]
        if 0 in ports:
            return CallFailed(call, 503, "starting", "the engine is starting: try again in a moment")
        return Desks(call, tuple(ports))


async def receive_guests(process: Process) -> Guests | None:
    """Take the port of this tokenizer, if the engine listens to other machines. UserError when the keys or the port cannot be used."""
    config = process.config
    if config.listen is None or config.keys is None:
        return None
    check_curve()
    folder = Path(config.keys).expanduser()
    pair, authorized = read_server(folder), Authorized(folder)
    refused = process.metrics.counter(REJECTED_CONNECTIONS, REJECTED_CONNECTIONS_HELP, (("process", process.name),))
    port = _port(process, process.name)
    address = f"{host_of(config.listen)}:{port or '*'}"
    patience = time.monotonic() + TAKEN_S
    while True:
        try:
            desk = GuardedDesk(process.context, address, FromGuest, pair, authorized, process.rejected_frames, refused)
            break
        except zmq.ZMQError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > patience:
                raise UserError(f"--listen {config.listen}: {address} cannot be listened at ({error.strerror}): name another") from None
        await asyncio.sleep(LOOK_S)
    if not port:
        port = port_of(desk.address)
        _port_file(process, process.name).write_text(str(port))
    log.info("direct clients are received on %s:%d with the server key %s", host_of(config.listen), port, pair.public.decode())
    return Guests(process, desk)


def _port(process: Process, tokenizer: str) -> int:
    """Where `tokenizer` receives guests; 0 while that is not known."""
    assert process.config.listen
    if first := port_of(process.config.listen):
        return first + tokenizer_names(process.config).index(tokenizer)
    try:
        return int(_port_file(process, tokenizer).read_text())
    except (FileNotFoundError, ValueError):
        return 0


def _port_file(process: Process, tokenizer: str) -> Path:
    return process.run_dir / f"{tokenizer}.port"
