"""The one schema of every setting: flags, environment and the TOML file all fill this struct (see `engine.settings`).

The supervisor validates it once and hands it, with the resolved model, to every child. A setting's name here is its key in the TOML
file; the flag is `--like-this`, the environment variable `HEADRACE_LIKE_THIS`. Its description is the flag's help.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta


def _about(description: str, metavar: str | None = None) -> Meta:
    return Meta(description=description, extra={"metavar": metavar})


Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Settings of one engine."""

    model: Annotated[str | None, _about("a GGUF file, a model directory or a hub name as org/name; the embedded default without one")] = (
        None
    )
    revision: Annotated[str | None, _about("branch, tag or commit of a hub model", "REF")] = None
    served_model_name: Annotated[str | None, _about("name that clients ask for; from the model's files without one", "NAME")] = None
    host: Annotated[str, _about("address to listen on; 0.0.0.0 for every one", "ADDRESS")] = "127.0.0.1"
    port: Annotated[Annotated[int, Meta(ge=0, le=65535)], _about("port to listen on; 0 takes a free one")] = 8000
    api_key: Annotated[
        str | None,
        _about(
            "bearer token that requests must bring; several tenants': with commas. HEADRACE_API_KEY keeps it out of `ps`",
            "KEY",
        ),
    ] = None
    admin_key: Annotated[
        str | None, _about("API key for /admin/drain, /admin/resume and /admin/reload; without it nobody may ask for these", "KEY")
    ] = None
    listen: Annotated[
        str | None,
        _about(
            "where direct clients on other machines are received, encrypted, if their keys are in --keys; more tokenizers take the ports "
            "that follow, and port 0 takes free ones",
            "tcp://HOST:PORT",
        ),
    ] = None
    keys: Annotated[str | None, _about("folder of the keys for --listen, as `headrace keys` makes it", "DIR")] = None
    threads: Annotated[Count | None, _about("compute threads of a worker; one a physical core without it")] = None
    kernels: Annotated[
        Literal["auto", "reference", "cpu", "triton"],
        _about("implementation of the model's operations: the fastest that runs here, or a named one"),
    ] = "auto"
    activations: Annotated[
        Literal["auto", "int8", "bf16", "f32"],
        _about(
            "what weights are multiplied with: inputs rounded to 8 bits in groups of 32, to bfloat16 (and weights too), or as they are; "
            "auto is int8 for weights that are integers, bf16 for those that are so or float8 on CPUs with AMX, and f32 for the rest; "
            "reference kernels round for a quantized checkpoint as that asks"
        ),
    ] = "auto"
    max_context: Annotated[
        Count | None, _about("most tokens of prompt and output together; the model's own limit without it", "TOKENS")
    ] = None
    page_size: Annotated[Annotated[int, Meta(ge=8, le=256)], _about("tokens a KV page, a power of two", "TOKENS")] = 16
    kv_memory: Annotated[
        str | None, _about('memory for KV pages of each worker, such as "2GiB"; chosen from what is free without it', "SIZE")
    ] = None
    kv_dtype: Annotated[
        Literal["f16", "bf16", "f32", "int8", "fp8"],
        _about("number format of keys and values in KV pages; bf16 and fp8 (e4m3, scaled) with the Triton and the reference kernels alone"),
    ] = "f16"
    prefix_cache: Annotated[bool, _about("keep the KV pages of finished requests for those that begin alike")] = True
    draft: Annotated[
        Literal["none", "ngram"],
        _about("who guesses tokens ahead, to be verified several at a time: ngram looks them up in the text so far"),
    ] = "none"
    max_running: Annotated[Count, _about("most requests in one step")] = 256
    max_step_tokens: Annotated[
        Count | None, _about("token budget of one step; what suits the kernels without it: 256 on CPUs, 4096 on GPUs", "TOKENS")
    ] = None
    step_target: Annotated[
        Annotated[float, Meta(ge=0, le=1e9)],
        _about(
            "how long chunks of prompts may make a step in which other requests decode, if that is not less than 1.6 of it; and where "
            "tenants share the engine, how long decodes may make one, if that is not less than 2 of a single one's",
            "SECONDS",
        ),
    ] = 0.05
    max_waiting: Annotated[Count, _about("most queued requests; further ones get 429")] = 1024
    max_waiting_tokens: Annotated[Count, _about("most prompt tokens of queued requests; further ones get 429", "TOKENS")] = 1 << 20
    request_timeout: Annotated[
        Annotated[float, Meta(ge=0.001, le=1e9)] | None,
        _about("time in which a request must be done, where it does not set its own `timeout`; none without it", "SECONDS"),
    ] = None
    tokenizers: Annotated[Annotated[int, Meta(ge=1, le=64)], _about("tokenizer processes")] = 1
    tensor_parallel: Annotated[Count, _about("workers that share each layer of the model")] = 1
    drain_timeout: Annotated[
        Annotated[float, Meta(ge=0, le=1e9)], _about("time that running requests get to finish after SIGTERM", "SECONDS")
    ] = 30.0
    hang_timeout: Annotated[
        Annotated[float, Meta(ge=0.2, le=1e9)],
        _about("a process that owes an answer for so long is killed and started again; longer than any step may take", "SECONDS"),
    ] = 20.0
    max_restarts: Annotated[
        Annotated[int, Meta(ge=0, le=2**31 - 1)], _about("deaths of processes within a minute beyond which the engine gives up")
    ] = 5
    request_log: Annotated[
        str | None, _about("file to which a JSON line is added for each request that ends; - for standard error", "FILE")
    ] = None
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], _about("least severe messages to log; debug adds traces to errors")
    ] = "info"
