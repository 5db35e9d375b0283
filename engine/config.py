"""The one schema of every setting: flags, environment and the TOML file all fill this struct.

The supervisor validates it once and hands it, with the resolved model, to every child.
"""

import msgspec


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Settings of one engine. Names are the flags' names with `_` for `-`."""

    model: str | None = None
    """A directory, a GGUF file or a hub name; None is the embedded default."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    served_model_name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    threads: int | None = None
    """Compute threads of a worker; None is one a physical core."""
    kernels: str = "auto"
    activations: str = "f32"
    max_context: int | None = None
    """Most tokens of prompt and output together; None is the model's own limit."""
    page_size: int = 16
    """Tokens a KV page."""
    kv_memory: str | None = None
    """Memory for KV pages of each worker, such as "2GiB"; None chooses from what is free."""
    prefix_cache: bool = True
    max_running: int = 256
    """Most requests in one step."""
    max_step_tokens: int = 512
    """Token budget of one step."""
    max_waiting: int = 1024
    """Most queued requests before new ones get 429."""
    tokenizers: int = 1
    tensor_parallel: int = 1
    drain_timeout: float = 30.0
    """Seconds that running requests get to finish after SIGTERM."""
    log_level: str = "info"
