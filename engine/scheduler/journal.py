"""The request journal: for each live request, all that is needed to compute it again.

Sampling is counter-based, so a request is a pure function of its prompt, its parameters, its seed and the tokens emitted so far. Whatever
happens to a worker, the journal gives the same continuation.
"""

from headrace.engine.ledger.sequence import Sequence
from headrace.engine.messages.steps import Admit
from headrace.engine.messages.tokens import PromptLogprobs, Submit, TokenEnd, TokenLogprobs
from headrace.engine.scheduler.pace import Pace
from headrace.engine.scheduler.suspicion import Suspicion


class Entry:
    """One live request, from its submission to its terminal message."""

    __slots__ = (
        "arrived",
        "attempt",
        "before",
        "cached",
        "chunks",
        "first_token",
        "logprobs",
        "pace",
        "preemptions",
        "prompt_logprobs",
        "reply_to",
        "sequence",
        "started",
        "submit",
        "suspicion",
        "worker_deaths",
    )

    def __init__(self, submit: Submit, arrived: float) -> None:
        self.submit = submit
        self.reply_to = submit.reply_to
        """The tokenizer that gets its tokens; another one after a death."""
        self.attempt = submit.attempt
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: list[PromptLogprobs] = []
        self.arrived = arrived
        """Monotonic seconds."""
        self.before = submit.emitted
        """What it had emitted when it last was in no ledger."""
        self.started: float | None = None
        """When a step first ran it, monotonic seconds."""
        self.first_token: float | None = None
        """When its first token was known, monotonic seconds."""
        self.chunks = 0
        """Steps that computed some of its prompt."""
        self.cached = 0
        self.preemptions = 0
        self.worker_deaths = 0
        """Workers that died in a step that ran it."""
        self.suspicion = Suspicion()
        self.pace = Pace()
        self.sequence: Sequence | None = None
        """Its sequence in the mirror ledger, or the one that waits to be admitted; None between epochs, and while an
        earlier life of the request is in the ledger still."""

    @property
    def emitted(self) -> list[int]:
        """All tokens that it has emitted: what its sequence has beyond the prompt."""
        return self.before if self.sequence is None else self.sequence.tokens[self.sequence.prompt :]

    @property
    def emitted_count(self) -> int:
        return len(self.before) if self.sequence is None else self.sequence.emitted

    def leave_ledger(self) -> None:
        """The ledger that its sequence is in is given up: keep what was emitted."""
        self.before, self.sequence = self.emitted, None

    def admit(self) -> Admit:
        """What workers must know to continue it."""
        submit = self.submit
        return Admit(submit.request, submit.prompt, self.emitted, submit.sampling, submit.seed)

    @property
    def suspect(self) -> bool:
        """Whether it must run alone; see `suspicion.py`."""
        return self.suspicion.alone(self.emitted_count)

    def end(self, reason: str, now: float) -> TokenEnd:
        """Its last message. `reason` as in `TokenEnd`."""
        last = self.emitted[-1] if self.emitted_count else None
        stop = last if reason == "stop" and last in self.submit.sampling.stop_token_ids else None
        queued = (self.started if self.started is not None else now) - self.arrived
        return TokenEnd(self.submit.request, reason, stop, self.cached, queued, self.preemptions)


class Journal:
    """Live requests in the order of their arrival."""

    def __init__(self) -> None:
        self._entries: dict[int, Entry] = {}
        self.get = self._entries.get
        """The entry of a live request, None for others."""
        self.prompt_tokens = 0
        """Of all live requests together."""

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request: int) -> bool:
        return request in self._entries

    def open(self, submit: Submit, now: float) -> Entry:
        entry = self._entries[submit.request] = Entry(submit, now)
        self.prompt_tokens += len(submit.prompt)
        return entry

    def close(self, request: int) -> Entry | None:
        """Forget a request that is over; None when it is not known."""
        entry = self._entries.pop(request, None)
        if entry is not None:
            self.prompt_tokens -= len(entry.submit.prompt)
        return entry

    def must_have(self, request: int) -> Entry:
        """The entry of a request that runs."""
        entry = self.get(request)
        assert entry is not None, f"request {request:x} runs without a journal entry"
        return entry

    def running(self, request: int) -> Entry | None:
        """The entry of a request that a step has run. None if it is over, be it that it has been submitted again since."""
        entry = self.get(request)
        return entry if entry is not None and entry.sequence is not None else None

    def entries(self) -> list[Entry]:
        return list(self._entries.values())
