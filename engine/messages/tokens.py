"""Between a tokenizer and the scheduler: requests as token ids, and tokens as they come.

    tokenizer ── Submit, Cancel ──────▶ scheduler
    tokenizer ◀─ Tokens…, Refused, Moved ── scheduler

The `index` column makes delivery exactly-once across restarts: the receiver keeps how many tokens it has of each request
and drops what it already has.
"""

from typing import Annotated

from msgspec import Meta

from headrace.engine.messages.sampling import Sampling
from headrace.engine.messages.wire import Message, Moment, TokenId, check_columns


class Submit(Message):
    """Run one request. `emitted` holds tokens that were generated before a restart; they count as output."""

    request: int
    reply_to: str
    """The tokenizer process that gets the tokens."""
    prompt: Annotated[list[TokenId], Meta(min_length=1)]
    sampling: Sampling
    seed: int
    emitted: list[TokenId] = []
    tenant: str = ""
    """Whose it is; tenants get equal shares."""
    priority: int = 0
    """Lower ones are served first."""
    deadline: Moment | None = None
    """When it is to end whether it is done or not, in seconds of this machine's monotonic clock."""
    answer: str = ""
    """See `Generate.answer`."""
    trace: str = ""
    """See `Generate.trace`."""
    attempt: int = 0
    """See `Generate.attempt`. The tokenizer of the latest one gets the tokens: what a dead one sent may come after its heir's."""


class Cancel(Message):
    """End requests from outside: a client went away ("abort"), or a stop string was found in the text ("stop")."""

    requests: tuple[int, ...]
    reason: str


class TokenLogprobs(Message):
    """The distribution at one position of one request, as far as it was asked for."""

    request: int
    index: int
    """Which output token (0 is the first emitted), or which prompt token in `PromptLogprobs`."""
    logprob: float
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_columns(self, "top_ids", "top_logprobs")


class PromptLogprobs(Message):
    """Scores of prompt tokens `first` … `first + len(logprobs) - 1`; a long prompt comes in several."""

    request: int
    first: int
    logprobs: list[float]
    top_ids: list[tuple[int, ...]]
    top_logprobs: list[tuple[float, ...]]

    def __post_init__(self) -> None:
        check_columns(self, "top_ids", "top_logprobs", *(["logprobs"] if self.top_ids else []))
        if any(len(ids) != len(logprobs) for ids, logprobs in zip(self.top_ids, self.top_logprobs, strict=True)):
            raise ValueError("columns of PromptLogprobs differ in length within a position")


class TokenEnd(Message):
    """A request that is over, with what its frontend will want to know."""

    request: int
    reason: str
    """"stop", "length", "abort"."""
    stop_token: int | None
    """The stop token id that ended it, None for the model's end token and for other reasons."""
    cached_tokens: int
    queue_s: float
    preemptions: int


class Tokens(Message):
    """What one step gave to one tokenizer's requests: three columns of equal length, one entry a token."""

    epoch: int
    step: int
    requests: list[int]
    index: list[int]
    """Place of the token in the request's output, from 0."""
    tokens: list[TokenId]
    logprobs: list[TokenLogprobs] = []
    prompt_logprobs: list[PromptLogprobs] = []
    ends: list[TokenEnd] = []

    def __post_init__(self) -> None:
        check_columns(self, "requests", "index", "tokens")


class Refused(Message):
    """A request that the scheduler does not take: its queue is full (429), it is draining (503), or it can never fit (400)."""

    request: int
    status: int
    code: str
    message: str
    retry_after: float | None = None
    hold_s: float = 0.0
    """Seconds in which any other new request would be told the same: whoever knows need not bring it."""


class Moved(Message):
    """The tokens of a request go to another tokenizer, where `attempt` asked for it; an earlier attempt hears nothing more of it."""

    request: int
    attempt: int


class SchedulerUp(Message):
    """A scheduler has (re)started and knows no request: whoever holds some submits them again, with the emitted tokens."""

    incarnation: int


ToScheduler = Submit | Cancel
FromScheduler = Tokens | Refused | Moved | SchedulerUp
