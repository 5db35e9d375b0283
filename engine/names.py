"""What the processes of an engine are called. A name is an address: see `engine.actor.endpoint`."""

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


def worker_names(config: Config) -> list[str]:
    """By rank."""
    return [f"worker-{rank}" for rank in range(config.tensor_parallel)]
