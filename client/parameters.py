"""The keyword arguments of a generation request, for type checkers and editors.

They go to the server as they are, so a server's own checks and messages apply; what is not given is not sent, and the server's default
holds. The first group is OpenAI's, the second this engine's extensions (the names are those other engines use).
"""

from typing import Any, TypedDict


class Parameters(TypedDict, total=False):
    """What chat and plain completions have in common."""

    model: str
    """Default: the first model that the server lists."""
    max_tokens: int
    temperature: float
    top_p: float
    n: int
    stop: str | list[str]
    seed: int
    presence_penalty: float
    frequency_penalty: float
    logit_bias: dict[str, float]
    stream_options: dict[str, bool]
    """{"include_usage": True} makes the last chunk of a stream carry the token counts."""
    user: str

    top_k: int
    min_p: float
    repetition_penalty: float
    min_tokens: int
    ignore_eos: bool
    stop_token_ids: list[int]
    skip_special_tokens: bool
    include_stop_str_in_output: bool
    priority: int
    timeout: float
    """Seconds in which the answer must be done; the server ends it with an error if it is not."""


class ChatParameters(Parameters, total=False):
    """Beside the messages."""

    max_completion_tokens: int
    logprobs: bool
    top_logprobs: int
    add_generation_prompt: bool
    continue_final_message: bool
    chat_template_kwargs: dict[str, Any]


class CompletionParameters(Parameters, total=False):
    """Beside the prompt."""

    logprobs: int
    echo: bool
