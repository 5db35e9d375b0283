"""What a step is planned from, and the step in the making: data only, which `plan.py` and `ahead.py` decide over.

Situation ─▶ Step (what is left of pages and tokens) ─▶ Decision
"""

from collections.abc import Collection
from collections.abc import Sequence as Series
from dataclasses import dataclass, field

from headrace.engine.ledger.ledger import Ledger
from headrace.engine.ledger.sequence import Sequence
from headrace.engine.scheduler.speed import Speed
from headrace.engine.scheduler.tenants import Tenants


@dataclass(frozen=True, slots=True)
class Limits:
    max_running: int
    max_step_tokens: int
    drafts: bool = False
    """Whether sequences may have drafts verified."""


@dataclass(slots=True)
class Situation:
    """All that a step is planned from. Planning changes nothing of it."""

    ledger: Ledger
    running: Series[Sequence]
    """Those with pages, in the order of their admission."""
    waiting: Collection[Sequence]
    """Those without, first come first. The ledger may know one already: it was preempted."""
    limits: Limits
    speed: Speed | None = None
    """Bounds what may run beside decodes."""
    tenants: Tenants | None = None
    """Needed where there are several."""
    shared: bool = False
    """Whether tenants share the engine, with one who may come in a moment as well. Then `speed` bounds the decodes too."""


@dataclass(slots=True)
class Decision:
    """What becomes a `Plan`: sequences to preempt, waiting ones to start, and all that run with how many tokens each."""

    preempt: list[Sequence] = field(default_factory=list)
    start: list[Sequence] = field(default_factory=list)
    run: list[tuple[Sequence, int]] = field(default_factory=list)
    lookahead: list[int] = field(default_factory=list)
    """For those of `run`, in their order: how many drafts each may have verified."""


class Step:
    """A decision in the making, and what it leaves."""

    def __init__(self, now: Situation, preempt: list[Sequence]) -> None:
        self.now = now
        self.decision = Decision(preempt)
        self.left = [sequence for sequence in now.running if sequence not in preempt]
        """Running sequences that are not preempted."""
        self.short: set[int] = set()
        """Requests that were preempted because pages ran out."""
        self.available = now.ledger.available + sum(map(now.ledger.pages_freed_by, preempt))
        """Pages."""
        self.budget = now.limits.max_step_tokens
        """Tokens."""

    def run(self, sequence: Sequence, length: int) -> None:
        """Have it compute so many tokens of its prompt, for which there are pages."""
        self.decision.run.append((sequence, length))
        self.decision.lookahead.append(0)
        self.budget -= length

    def make_room(self, sequence: Sequence, pages: int) -> bool:
        """Preempt from the end until `pages` are available; False when `sequence` itself had to go."""
        while pages > self.available:
            victim = self.left.pop()
            self.short.add(victim.request)
            self.decision.preempt.append(victim)
            self.available += self.now.ledger.pages_freed_by(victim)
            if victim is sequence:
                return False
        return True
