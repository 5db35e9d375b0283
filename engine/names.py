"""What the processes of an engine are called. A name is an address: see `engine.actor.endpoint`."""

import re

from headrace.engine.config import Config

SUPERVISOR = "supervisor"
SCHEDULER = "scheduler"


def server_names(config: Config) -> list[str]:
    return ["server-0"]


def tokenizer_names(config: Config) -> list[str]:
    return [f"tokenizer-{index}" for index in range(config.tokenizers)]


def desk_name(tokenizer: str) -> str:
    """Where a tokenizer receives frontends."""
    return f"{tokenizer}.desk"


LISTEN = re.compile(r"tcp://([^\s:/\[\]]+|\[[0-9a-fA-F:.%\w]+\]):([0-9]{1,5})")
"""An address where clients on other machines are received, or where they find that: host and port."""


def port_of(listen: str) -> int:
    return int(listen.rpartition(":")[2])


def host_of(listen: str) -> str:
    """With the scheme before it: what remains is ":PORT"."""
    return listen.rpartition(":")[0]


def worker_names(config: Config) -> list[str]:
    """By rank."""
    return [f"worker-{rank}" for rank in range(config.tensor_parallel)]
