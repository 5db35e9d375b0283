"""Between the scheduler and the workers: numbered plans of logical work, and their results.

No page number and no tensor travels. Every rank applies `Plan k`, computes, applies `StepResult k`, and so on, in this
order; page tables follow from that (see `engine.ledger`).

    scheduler ── Begin, Plan 0, Plan 1, … ──▶ every rank
    scheduler ◀─ WorkerUp, StepResult 0, … ── every rank says it is up, rank 0 sends results, all send their digest
"""

from headrace.engine.messages.sampling import Sampling
from headrace.engine.messages.tokens import PromptLogprobs, TokenLogprobs
from headrace.engine.messages.wire import Message, Natural, Positive, TokenId, check_columns


class WorkerUp(Message):
    """A worker has its weights and its KV pages and waits for an epoch."""

    rank: Natural
    incarnation: int
    pages: Positive
    page_size: Positive
    """Tokens a page."""


class Hello(Message):
    """The scheduler has (re)started: answer with `WorkerUp`."""

    incarnation: int


class Begin(Message):
    """Start an epoch: forget every request, every page and every prefix; the next plan is step 0 of this epoch."""

    epoch: int
    """Greater than those before, also those of schedulers before; what comes late from one of these starts nothing."""
    pages: Positive
    page_size: Positive
    end_tokens: tuple[int, ...]
    prefix_cache: bool = True


class Admit(Message):
    """A request that the workers learn of with this plan."""

    request: int
    prompt: list[int]
    emitted: list[int]
    sampling: Sampling
    seed: int


class Plan(Message):
    """One step of work. Applied in the order of the fields."""

    epoch: int
    step: int
    digest: int
    """The ledger's digest before this plan, by the scheduler's mirror; not known where `ahead`."""
    abort: list[int]
    preempt: list[int]
    admit: list[Admit]
    run: list[int]
    """Requests that compute in this step, in batch order."""
    lengths: list[int]
    """How many of its tokens each computes."""
    ahead: bool = False
    """Written before the result of the step before was known: what that step ran goes on, a token each, but for what it ended. `run`
    and `lengths` are empty, `lookahead` is by the rows of that step."""
    lookahead: list[int] = []
    """How many drafted tokens each may have verified behind its own, where any may."""

    def __post_init__(self) -> None:
        check_columns(self, "run", "lengths", *(["lookahead"] if self.lookahead and not self.ahead else []))
        if self.ahead and self.run:
            raise ValueError("a Plan ahead names requests: it runs those of the step before")


class StepTimes(Message):
    """Where a step's time went on the worker, in nanoseconds."""

    prepare: int
    forward: int
    sample: int
    total: int


class StepResult(Message):
    """What a step computed: the sampled tokens of the requests whose known tokens are all computed.

    `requests`, `counts` and `tokens` are columns: request i emitted `counts[i]` tokens, which lie one after the other in
    `tokens`. A count is one more than the drafts that proved right, or 0 for a request that failed because its logits were invalid.
    """

    epoch: int
    step: int
    rank: Natural
    digest: int
    """The rank's ledger digest after applying the plan of this step."""
    requests: list[int]
    counts: list[Natural]
    tokens: list[TokenId]
    logprobs: list[TokenLogprobs]
    prompt_logprobs: list[PromptLogprobs]
    times: StepTimes
    drafted: list[int] = []
    """How many tokens were drafted for each of `requests`, where any were."""

    def __post_init__(self) -> None:
        check_columns(self, "requests", "counts", *(["drafted"] if self.drafted else []))
        if sum(self.counts) != len(self.tokens):
            raise ValueError(f"counts of StepResult add up to {sum(self.counts)}, there are {len(self.tokens)} tokens")


ToWorker = Hello | Begin | Plan
FromWorker = WorkerUp | StepResult
