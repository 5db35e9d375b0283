"""The keys by which an engine and its clients on other machines know each other: CURVE pairs in ZeroMQ's certificate files.

    DIR/server.key_secret       the engine's secret; stays where the engine runs
    DIR/server.key              its public half; every client gets a copy
    DIR/clients/NAME.key        public keys of those who may connect; to remove one shuts its owner out
    DIR/clients/NAME.key_secret the pair of NAME, to be moved to where NAME runs

`headrace keys` makes them, `headrace serve --keys DIR` and `headrace.client.RemoteClient` read them. A secret that others can read is
refused. Nothing here opens a socket.
"""

import argparse
import os
import re
import time
from pathlib import Path
from typing import NamedTuple

import zmq
import zmq.auth

from headrace.engine.errors import UserError

SERVER = "server"
CLIENTS = "clients"
PUBLIC, SECRET = ".key", ".key_secret"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
KEY = re.compile(rb"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
"""A key in Z85 (rfc.zeromq.org/spec/32)."""

RACY_NS = 1_000_000_000
"""A folder that changed so shortly before it was read may change once more without a new date."""

DESCRIPTION = """\
Make the keys for `headrace serve --listen tcp://HOST:PORT --keys DIR`: the engine's own pair, if DIR has none, and one for each NAME.
Every name is a tenant. DIR/clients/NAME.key_secret and DIR/server.key are what NAME needs; move the former to where NAME runs."""


class Pair(NamedTuple):
    """A public key and its secret, in Z85."""

    public: bytes
    secret: bytes


def check_curve() -> None:
    """UserError when the ZeroMQ of this machine cannot encrypt."""
    if not zmq.has("curve"):
        raise UserError("this build of ZeroMQ is without CURVE: install pyzmq from its wheels, or build libzmq with libsodium")


def read_pair(path: Path) -> Pair:
    """The pair in a secret certificate file. UserError when it cannot be used, or others may read it."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise UserError(f"{path}: no secret key can be read there ({error.strerror}): `headrace keys` makes one") from None
    if mode & 0o077:
        raise UserError(f"{path} holds a secret and can be read by others: chmod 600 {path}, or make a new one if they may have")
    public, secret = _read(path)
    if secret is None:
        raise UserError(f"{path} holds no secret key: name the file that ends in {SECRET}")
    if zmq.curve_public(secret) != public:
        raise UserError(f"{path}: the public key does not belong to the secret one: make a new pair with `headrace keys`")
    return Pair(public, secret)


def read_public(path: Path) -> bytes:
    """The public key in a certificate file. UserError when there is none."""
    return _read(path)[0]


def read_server(folder: Path) -> Pair:
    """The pair of the engine whose keys are in `folder`. UserError when it cannot be used."""
    if not (folder / (SERVER + SECRET)).exists():
        raise UserError(f"--keys {folder} has no {SERVER}{SECRET}: `headrace keys {folder} NAME` makes it, and a pair for a client")
    return read_pair(folder / (SERVER + SECRET))


def _read(path: Path) -> tuple[bytes, bytes | None]:
    try:
        public, secret = zmq.auth.load_certificate(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no ZeroMQ certificate ({error}): `headrace keys` makes them") from None
    if not all(KEY.fullmatch(key) for key in (public, secret) if key is not None):
        raise UserError(f"{path} has a key that is not 40 characters of Z85: the file is damaged")
    return public, secret


class Authorized:
    """The public keys in `folder`/clients as they are now: files may come and go while the engine runs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / CLIENTS
        self._keys: frozenset[bytes] = frozenset()
        self._read_at: int | None = None
        """The folder's date when it was read; None while it must be read again."""

    def __contains__(self, key: bytes) -> bool:
        try:
            changed = self._folder.stat().st_mtime_ns
            if changed != self._read_at:
                self._keys = frozenset(filter(None, map(_public_or_none, self._folder.glob(f"*{PUBLIC}"))))
                self._read_at = changed if time.time_ns() - changed > RACY_NS else None
        except OSError:
            # Nobody is let in by a folder that cannot be read.
            self._keys, self._read_at = frozenset(), None
        return key in self._keys


def _public_or_none(path: Path) -> bytes | None:
    try:
        return read_public(path)
    except UserError:
        return None


def make(folder: Path, names: list[str]) -> list[Path]:
    """Make the engine's pair where there is none, and one for each of `names`; the files that were written. UserError when that fails."""
    check_curve()
    clients = folder / CLIENTS
    for name in names:
        if not NAME.fullmatch(name):
            raise UserError(f"{name!r} is no name for a key: use letters, digits, '.', '_' and '-'")
        if (clients / (name + PUBLIC)).exists() or (clients / (name + SECRET)).exists():
            raise UserError(f"{clients / name}{PUBLIC} is there already: choose another name, or remove it to shut its owner out")
    umask = os.umask(0o077)
    try:
        clients.mkdir(parents=True, exist_ok=True)
        made = [] if (folder / (SERVER + SECRET)).exists() else [*zmq.auth.create_certificates(folder, SERVER)]
        for name in names:
            made += zmq.auth.create_certificates(clients, name)
    except OSError as error:
        raise UserError(f"{folder}: no keys can be written there ({error.strerror}): name a folder of yours") from None
    finally:
        os.umask(umask)
    return [Path(path) for path in made]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="where the keys are, or are to be")
    parser.add_argument("names", metavar="NAME", nargs="*", help="clients that get a pair")


def run(chosen: argparse.Namespace) -> int:
    made = make(Path(chosen.folder).expanduser(), chosen.names)
    for path in made:
        print(path)
    if not made:
        print("headrace: the engine has its keys already; name a client to make a pair for it")
    return 0
