"""Bodies that the endpoint answers with, and the chunks of its streams."""

import msgspec


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int = 0
    """Prompt tokens that the prefix cache gave."""


class Usage(msgspec.Struct):
    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0
    prompt_tokens_details: PromptTokensDetails | None = None


class TopLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int] | None = None


class ChatLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int] | None = None
    top_logprobs: list[TopLogprob] = []


class ChatLogprobs(msgspec.Struct):
    content: list[ChatLogprob] | None = None
    refusal: None = None


class ChatMessage(msgspec.Struct):
    role: str
    content: str | None = None
    refusal: None = None


class ChatChoice(msgspec.Struct):
    index: int
    message: ChatMessage
    finish_reason: str | None = None
    logprobs: ChatLogprobs | None = None
    stop_reason: str | int | None = None
    """The stop string or stop token that ended it (vLLM's extension)."""


class ChatCompletion(msgspec.Struct):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | None = None
    object: str = "chat.completion"
    system_fingerprint: str | None = None


class Delta(msgspec.Struct, omit_defaults=True):
    role: str | None = None
    content: str | None = None


class ChatChunkChoice(msgspec.Struct):
    index: int
    delta: Delta
    finish_reason: str | None = None
    logprobs: ChatLogprobs | None = None
    stop_reason: str | int | None = None


class ChatCompletionChunk(msgspec.Struct):
    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    object: str = "chat.completion.chunk"
    system_fingerprint: str | None = None


class CompletionLogprobs(msgspec.Struct):
    """Columns with one entry a token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]
    """Where the token's text begins in the choice's text, in characters."""


class CompletionChoice(msgspec.Struct):
    index: int
    text: str
    finish_reason: str | None = None
    logprobs: CompletionLogprobs | None = None
    stop_reason: str | int | None = None


class Completion(msgspec.Struct):
    """A whole completion, and a chunk of a streamed one: OpenAI uses one shape for both."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    object: str = "text_completion"
    system_fingerprint: str | None = None


class Model(msgspec.Struct):
    id: str
    created: int = 0
    object: str = "model"
    owned_by: str = "headrace"
    max_model_len: int | None = None
    """Most tokens of prompt and output together (vLLM's extension)."""


class ModelList(msgspec.Struct):
    data: list[Model]
    object: str = "list"


class Tokenized(msgspec.Struct, omit_defaults=True):
    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str] | None = None


class Detokenized(msgspec.Struct):
    prompt: str


class Error(msgspec.Struct):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct):
    error: Error


class ProcessHealth(msgspec.Struct):
    name: str
    state: str
    pid: int
    restarts: int
    uptime_s: float


class Health(msgspec.Struct):
    """GET /health: is work pending, and does it move?"""

    status: str
    """"ok", "starting", "recovering", "draining" or "stalled"."""
    running: int = 0
    waiting: int = 0
    step: int = 0
    last_step_age_s: float | None = None
    processes: list[ProcessHealth] = []
