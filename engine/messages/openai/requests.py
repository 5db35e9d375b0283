"""Bodies that clients send. An unknown field is an error, so that no parameter is accepted and ignored.

Fields under "no effect" are part of OpenAI's interface and change nothing in an answer of OpenAI's either; those under "refused unless" are
known by name and only their neutral value is taken. Both are listed in the README.
"""

from typing import Any, Literal

import msgspec


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool = False
    """Send a last chunk with the token counts and no choices."""


class ResponseFormat(msgspec.Struct, forbid_unknown_fields=True):
    type: str


class Generation(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Parameters that chat and plain completions share."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None

    # vLLM's extensions
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool = False
    stop_token_ids: list[int] | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    priority: int = 0

    # Ours
    timeout: float | None = None
    """Seconds in which the answer must be done; it ends with an error if it is not."""

    # No effect
    user: str | None = None


class Completion(Generation):
    """POST /v1/completions"""

    prompt: str | list[Any] | None = None
    """A string, token ids, or a list of either."""
    echo: bool = False
    logprobs: int | None = None
    best_of: int | None = None
    """Refused unless equal to n."""
    suffix: str | None = None
    """Refused."""


class Chat(Generation):
    """POST /v1/chat/completions"""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None

    # No effect
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: Literal["auto", "default"] | None = None

    # Refused unless neutral
    response_format: ResponseFormat | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    functions: list[dict[str, Any]] | None = None
    modalities: list[str] | None = None


class TokenizeText(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """POST /tokenize, as vLLM has it: `prompt`, or `messages` to be rendered by the chat template."""

    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    model: str | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeIds(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """POST /detokenize"""

    tokens: list[int]
    model: str | None = None
