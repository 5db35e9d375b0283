"""Keys for a test's engine, and where it receives clients on other machines."""

import re
from pathlib import Path
from typing import Any

from headrace.client import RemoteClient
from headrace.engine.keys import make
from tests.serving import FAKE, Served

LISTENS = r"direct clients are received on (tcp://\S+) with the server key (\S+)"


class Keys:
    """A folder of keys, with a pair for each of `names`."""

    def __init__(self, folder: Path, *names: str) -> None:
        self.folder = folder
        make(folder, list(names))

    @property
    def server(self) -> Path:
        return self.folder / "server.key"

    def of(self, name: str) -> Path:
        """The pair of a client."""
        return self.folder / "clients" / f"{name}.key_secret"


class Listening(Served):
    """An engine with a fake worker that receives guests who have one of `keys`."""

    def __init__(self, keys: Keys, worker: str = FAKE, **settings: Any) -> None:
        super().__init__(worker, **{"listen": "tcp://127.0.0.1:0", "keys": str(keys.folder)} | settings)
        self.keys = keys

    def addresses(self) -> list[str]:
        """Where guests are received now, by tokenizer."""
        found = [match for line in list(self.lines) if (match := re.search(rf"(tokenizer-\d+): {LISTENS}", line))]
        return [address for _, address in sorted({match[1]: match[2] for match in found}.items())]

    async def guest(self, name: str, patience: float = 20.0) -> RemoteClient:
        """A client with the pair of `name`."""
        return await RemoteClient.connect(self.addresses()[0], self.keys.of(name), self.keys.server, patience)
