"""Between a frontend (the HTTP server, or a direct client) and a tokenizer.

A frontend connects a DEALER to a tokenizer's ROUTER. Requests go in as text, come back as text:

    frontend ── Generate, Abort ──────────────▶ tokenizer
    frontend ◀─ Accepted, Text…, (End | Failed) ─ tokenizer
    frontend ── Recall ─▶ tokenizer ── Recalled ─▶ frontend
    on another machine ── ListDesks ─▶ tokenizer ── Desks ─▶

A request id is a 64-bit number, unique over all frontends and restarts. Every id in a `Generate` is answered by exactly one
terminal: an `End` inside a `Text`, or a `Failed`.
"""

from headrace.engine.messages.sampling import Sampling
from headrace.engine.messages.wire import Message, check_columns


class TextPrompt(Message):
    """A raw prompt. Special tokens that the tokenizer adds by itself (such as BOS) are added."""

    text: str


class TokenPrompt(Message):
    """A prompt that already is token ids; nothing is added."""

    ids: tuple[int, ...]


class ChatPrompt(Message):
    """A conversation, to be rendered by the model's chat template.

    `messages` holds the messages as the client sent them (role, content, name, …), JSON-encoded: their shape belongs to
    the template. The same holds for `template_arguments`, a JSON object of further variables, and for `tools`, a JSON list.
    """

    messages: bytes
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template_arguments: bytes = b"{}"
    tools: bytes = b"null"


Prompt = TextPrompt | TokenPrompt | ChatPrompt


class Generate(Message):
    """Generate one continuation of `prompt` for each id in `requests`."""

    requests: tuple[int, ...]
    seeds: tuple[int, ...]
    """One 64-bit sampling seed for each request."""
    prompt: Prompt
    sampling: Sampling
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    """Keep the matched stop string in the text."""
    skip_special_tokens: bool = True
    want_prompt: bool = False
    """Ask for the prompt's text and ids in `Accepted`, as `echo` needs them."""
    tenant: str = ""
    """Whose it is; tenants get equal shares. Of a client on another machine its key tells, whatever stands here."""
    priority: int = 0
    deadline: float | None = None
    """When it is to end whether it is done or not, in seconds of this machine's monotonic clock. From another machine, whose clock is
    another: in seconds from now."""
    emitted: tuple[tuple[int, ...], ...] = ()
    """When a request is submitted again after a death: for each id, the tokens already delivered."""
    answer: str = ""
    """Name of the answer that these requests are choices of, unique for the tenant; it is in logs, and recalls them."""
    first_choice: int = 0
    """Which choice of the answer the first of `requests` is; the others follow."""
    notes: bytes = b""
    """What the frontend must know to go on with the answer; kept beside the requests, and given back by a `Recall`. Empty for an answer
    that cannot be gone on with."""
    trace: str = ""
    """The `traceparent` of the span that this is a part of (W3C Trace Context), if there is one."""
    attempt: int = 0
    """How often it was sent to a tokenizer before, which died."""


class Abort(Message):
    """The frontend no longer wants these requests. Each still gets its one terminal message."""

    requests: tuple[int, ...]


class Recall(Message):
    """Ask for the requests of an answer whose frontend, or whose client, was lost not long ago. Answered by `Recalled`."""

    call: int
    answer: str
    tenant: str


class Tokenize(Message):
    call: int
    prompt: Prompt
    add_special_tokens: bool = True
    return_token_strs: bool = False


class Detokenize(Message):
    call: int
    ids: tuple[int, ...]


class Describe(Message):
    """Ask for the `ModelCard`."""

    call: int


class ListDesks(Message):
    """A client on another machine asks where all tokenizers receive such."""

    call: int


class Desks(Message):
    """The answer to `ListDesks`: the desks' ports, all on one address, which the client knows."""

    call: int
    ports: tuple[int, ...]


class Dismissed(Message):
    """To a client on another machine: its key is no longer among those that may connect, and what it sends is not read."""


class ModelCard(Message):
    """What a frontend must know of the served model."""

    call: int
    name: str
    context: int
    """Most tokens of prompt and output together."""
    vocab_size: int
    has_chat_template: bool
    created: int
    """Unix time, seconds."""


class Tokenized(Message):
    call: int
    ids: list[int]
    token_strs: list[str] | None
    context: int


class Detokenized(Message):
    call: int
    text: str


class Kept(Message):
    """One request of an answer, as far as it came."""

    generate: Generate
    """With this one request, its prompt as token ids, and all tokens known so far in `emitted`."""
    end: "End | None"
    """Its last word, if that is known."""


class Recalled(Message):
    """The requests of the answer that this tokenizer has, none where it has none."""

    call: int
    kept: list[Kept]


class CallFailed(Message):
    """The answer to a question that cannot be served; same fields as `Failed`."""

    call: int
    status: int
    code: str
    message: str
    param: str | None = None


class Accepted(Message):
    """The prompt was tokenized and handed to the scheduler."""

    request: int
    prompt_tokens: int
    prompt_text: str | None = None
    prompt_ids: list[int] | None = None


class TokenScore(Message):
    """The log-probability of one token at one place, and the most likely tokens there."""

    token: int
    text: str
    bytes: bytes
    """The token's own bytes, which need not be valid UTF-8 alone."""
    logprob: float
    top: tuple[tuple[int, str, bytes, float], ...] = ()
    """(id, text, bytes, logprob) by falling probability."""


class Scores(Message):
    """Token scores of one request that belong to the text of this message."""

    request: int
    scores: tuple[TokenScore, ...]


class PromptScores(Message):
    """Scores of a prompt's tokens; the first token has no score and stands as None."""

    request: int
    scores: tuple[TokenScore | None, ...]


class End(Message):
    """The last word on a request."""

    request: int
    reason: str
    """"stop" (end token, stop token or stop string), "length" or "abort"."""
    stop: str | int | None
    """The stop string or stop token that ended it, None for an end token."""
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    queue_s: float
    """Seconds from arrival at the scheduler to the first step that ran it."""
    preemptions: int = 0


class Text(Message):
    """What one step added, for all requests of one frontend: columns of equal length, then what few requests have."""

    requests: list[int]
    texts: list[str]
    counts: list[int]
    """Tokens emitted by the step for the request; its text may be empty while characters or stop strings are incomplete."""
    ends: list[End] = []
    scores: list[Scores] = []
    tokens: list[int] = []
    """The ids of the emitted tokens, request by request as `counts` divides them; a frontend keeps them for `Generate.emitted`."""

    def __post_init__(self) -> None:
        check_columns(self, "requests", "texts", "counts")


class Failed(Message):
    """A request that ends in an error: never accepted, or lost for a reason that `message` tells the user."""

    request: int
    status: int
    """HTTP status."""
    code: str
    message: str
    param: str | None = None
    retry_after: float | None = None
    """Seconds; with status 429 and 503."""
    hold_s: float = 0.0
    """See `Refused.hold_s`."""


ToTokenizer = Generate | Abort | Recall | Tokenize | Detokenize | Describe
ToFrontend = Accepted | Text | PromptScores | Failed | Recalled | Tokenized | Detokenized | ModelCard | CallFailed
FromGuest = ToTokenizer | ListDesks
ToGuest = ToFrontend | Desks | Dismissed
"""The same for clients on other machines."""
