"""What the next step computes: a pure function of the ledger and the queues.

There is no prefill and no decode, only sequences with tokens still to be computed. Those with one such token come first, for they are
what users see moving; the rest of the step's token budget goes to longer ones in chunks, then to newcomers, as far as the decodes'
pause allows (see `speed.py`). When decodes alone could eat the budget, a quarter of it stays with the others, and three quarters where
the others are of a tenant that was served less. Drafts are verified out of the decodes' part, shared evenly.

Where tenants share the engine, a step is to be over soon, lest who comes has to wait for what hundreds of another's requests do in it.
Then decodes get a part of the time that a step should take, the budget aside; when they are more they take turns, each tenant's as many
as any other's, and those that do not run keep their pages.

Pages: a newcomer is admitted when all its known tokens fit beside what earlier prefills still need. Decodes grow into what is
left; when nothing is, the request that was admitted last gives up its pages and waits again (its computed prefix stays cached as
long as nobody needs the room). So does the last request of a tenant with more than its share of the places, when another with less waits.

Many newcomers with the same new prefix: the first computes it, the others wait for its pages instead of computing them too.

Suspects, of whom a worker may have died, run alone: should another die, it is known why.
"""

from collections import Counter
from collections.abc import Collection, Iterable
from collections.abc import Sequence as Series
from dataclasses import dataclass, field
from itertools import takewhile
from operator import attrgetter

from headrace.engine.ledger.ledger import Ledger
from headrace.engine.ledger.sequence import Sequence
from headrace.engine.scheduler.speed import Speed
from headrace.engine.scheduler.tenants import Tenants

ALONE, BESIDE, AHEAD = 0.8, 0.5, 0.25
"""What part of a step's time decodes may take where tenants share: alone, beside prompts, and beside those of a tenant served less."""
AHEAD_STEP = 2.0
"""How many times as long as other steps one with such a prompt may be, where decodes take turns: its first token comes sooner, and theirs
have longer pauses anyway."""

MOST_PASSED_OVER = 64
"""Waiting requests that a step looks past because they wait for a prefix."""


@dataclass(frozen=True, slots=True)
class Limits:
    max_running: int
    max_step_tokens: int
    drafts: bool = False
    """Whether sequences may have drafts verified."""


@dataclass(slots=True)
class Decision:
    """What becomes a `Plan`: sequences to preempt, waiting ones to start, and all that run with how many tokens each."""

    preempt: list[Sequence] = field(default_factory=list)
    start: list[Sequence] = field(default_factory=list)
    run: list[tuple[Sequence, int]] = field(default_factory=list)
    lookahead: list[int] = field(default_factory=list)
    """For those of `run`, in their order: how many drafts each may have verified."""


def plan(
    ledger: Ledger,
    running: Series[Sequence],
    waiting: Collection[Sequence],
    limits: Limits,
    speed: Speed | None = None,
    tenants: Tenants | None = None,
    shared: bool = False,
) -> Decision:
    """Decide one step.

    `running` are the sequences with pages, in the order of their admission; `waiting` those without, first come first. A sequence of
    `waiting` may be known to the ledger already (it was preempted). `speed` limits what may run beside decodes. `tenants` are needed
    where there are several. Where they share the engine, with one who may come in a moment as well, `speed` limits the decodes too.
    Nothing is changed.
    """
    if alone := _suspect_alone(ledger, running, waiting, limits):
        return alone
    decision = Decision()
    tenants = tenants if tenants is not None and tenants.live > 1 else None
    if tenants and waiting:
        decision.preempt = _make_place(ledger, running, next(iter(waiting)), limits, tenants)
        if decision.preempt:
            running = [sequence for sequence in running if sequence not in decision.preempt]
    left = list(running)
    """Running sequences that are not preempted."""
    prefills = [sequence for sequence in running if len(sequence.tokens) - sequence.computed != 1]
    decodes = [sequence for sequence in running if len(sequence.tokens) - sequence.computed == 1] if prefills else list(running)
    starting = bool(waiting) and len(left) < limits.max_running
    later: list[Sequence] = []
    """Prompts that have begun, and come after one of a tenant that was served less and has not."""

    def due(sequence: Sequence) -> tuple[int, float]:
        return sequence.priority, tenants.served(sequence.tenant) if tenants else 0.0

    if tenants:
        prefills.sort(key=lambda sequence: (*due(sequence), sequence.arrived))
        if starting and prefills:
            head = due(next(iter(waiting)))
            first = sum(due(sequence) <= head for sequence in prefills)
            prefills, later = prefills[:first], prefills[first:]
    available = ledger.available + sum(ledger.pages_freed_by(victim) for victim in decision.preempt)
    budget = limits.max_step_tokens

    decode_budget = budget_of_decodes(budget) if prefills or waiting else budget
    behind = tenants is not None and (prefills or starting) and _is_behind(prefills, waiting, decodes, tenants)
    if behind:
        decode_budget = budget // 4
    most, crowded = decode_budget, shared and speed is not None and len(decodes) > speed.decodes(ALONE)
    if crowded:
        most = min(most, speed.decodes(AHEAD if behind else BESIDE if prefills or starting else ALONE))
    stretch = AHEAD_STEP if crowded and behind else 1.0
    if len(decodes) > most:
        decodes = _take_turns(decodes, most, tenants)
    preempted: set[int] = set()

    def make_room(sequence: Sequence, pages: int) -> bool:
        """Preempt from the end until `pages` are available; False when `sequence` itself had to go."""
        nonlocal available
        while pages > available:
            victim = left.pop()
            preempted.add(victim.request)
            decision.preempt.append(victim)
            available += ledger.pages_freed_by(victim)
            if victim is sequence:
                return False
        return True

    spare = spare_for_drafts(decode_budget, len(decodes))
    size, run = ledger.page_size, decision.run
    for sequence in decodes:
        if preempted and sequence.request in preempted:
            continue
        lookahead = 0
        # Most steps of most decodes need neither drafts nor a page.
        if sequence.lookahead or sequence.computed >= len(sequence.pages) * size:
            lookahead = drafts_of(sequence, spare, 1)
            pages = max(0, ledger.pages_for(sequence.computed + 1 + lookahead) - len(sequence.pages))
            if pages > available:
                lookahead = 0
                pages = max(0, ledger.pages_for(sequence.computed + 1) - len(sequence.pages))
                if pages > available and not make_room(sequence, pages):
                    continue
            available -= pages
        run.append((sequence, 1))
        decision.lookahead.append(lookahead)
    budget -= len(run) + sum(decision.lookahead)

    def go_on(prompts: list[Sequence]) -> None:
        """Compute a chunk of each, as far as budget and pages go."""
        nonlocal available, budget
        if speed is not None and decodes and prompts:
            budget = min(budget, speed.chunk(len(decodes), budget, prompts[0].computed, stretch))
        for sequence in prompts:
            if sequence.request in preempted or budget == 0:
                continue
            room = (len(sequence.pages) + available) * ledger.page_size - sequence.computed
            if room <= 0 and not decision.run:
                # Nothing else moves, so waiting for pages would be for ever.
                if not make_room(sequence, 1):
                    continue
                room = (len(sequence.pages) + available) * ledger.page_size - sequence.computed
            length = min(sequence.remaining, budget, room)
            if length > 0:
                available -= ledger.pages_for(sequence.computed + length) - len(sequence.pages)
                budget -= length
                decision.run.append((sequence, length))
                decision.lookahead.append(0)

    go_on(prefills)
    if waiting and budget and not preempted:
        if speed is not None and decodes and not prefills:
            budget = min(budget, speed.chunk(len(decodes), budget, stretch=stretch))
        newcomers = takewhile(lambda sequence: due(sequence) < due(later[0]), waiting) if later else waiting
        pages, budget = _admit(decision, ledger, prefills + later, newcomers, limits.max_running - len(left), available, budget)
        available -= pages
    if not (crowded and behind and decision.start):
        go_on(later)
    return decision


def _suspect_alone(ledger: Ledger, running: Series[Sequence], waiting: Iterable[Sequence], limits: Limits) -> Decision | None:
    """A step for a suspect, if there is one that has pages or can have them."""
    suspect = next((sequence for sequence in running if sequence.suspect), None)
    if suspect is not None:
        available, victims = ledger.available, []
        for victim in reversed(running):
            if len(suspect.pages) + available >= ledger.pages_for(suspect.computed + 1):
                break
            if victim is not suspect:
                victims.append(victim)
                available += ledger.pages_freed_by(victim)
        room = (len(suspect.pages) + available) * ledger.page_size - suspect.computed
        return Decision(victims, run=[(suspect, min(suspect.remaining, limits.max_step_tokens, room))], lookahead=[0])
    suspect = next(iter(waiting), None)
    if suspect is None or not suspect.suspect or len(running) >= limits.max_running:
        return None
    path = ledger.match_path(suspect)
    if _pages_to_start(ledger, suspect) - len(path) + sum(node.users == 0 for node in path) > ledger.available:
        return None
    length = min(len(suspect.tokens) - len(path) * ledger.page_size, limits.max_step_tokens)
    return Decision(start=[suspect], run=[(suspect, length)], lookahead=[0])


def _make_place(ledger: Ledger, running: Series[Sequence], head: Sequence, limits: Limits, tenants: Tenants) -> list[Sequence]:
    """Who has to go so that `head` can start: the latest of the tenant with most places, while that has more than its share of them and
    the head's tenant less. Nobody, if that would not be enough."""
    places = limits.max_running - len(running)
    missing = ledger.pages_for(len(head.tokens) + 1) - len(ledger.match_path(head)) - ledger.available
    if places > 0 and missing <= 0:
        return []
    share = limits.max_running // tenants.live
    held: dict[str, list[Sequence]] = {}
    for sequence in running:
        held.setdefault(sequence.tenant, []).append(sequence)
    if not held or len(held.get(head.tenant, ())) >= min(share, len(running) // tenants.live):
        return []
    most = max(held, key=lambda tenant: len(held[tenant]))
    victims: list[Sequence] = []
    for victim in reversed(held[most]):
        if len(held[most]) - len(victims) <= max(1, len(running) // tenants.live):
            break
        victims.append(victim)
        missing -= ledger.pages_freed_by(victim)
        if missing <= 0:
            return victims
    return []


def _take_turns(decodes: Series[Sequence], most: int, tenants: Tenants | None) -> list[Sequence]:
    """Those that run in this step when not all can, in their order: as many of each tenant as of any other that has so many, and of each
    those whose last step was longest ago."""
    lines: dict[str, list[Sequence]] = {}
    for sequence in sorted(decodes, key=attrgetter("last_run")):
        lines.setdefault(sequence.tenant, []).append(sequence)
    turns = [
        (place, tenants.served(tenant) if tenants else 0.0, sequence.request)
        for tenant, line in lines.items()
        for place, sequence in enumerate(line[:most])
    ]
    chosen = {request for _, _, request in sorted(turns)[:most]}
    return [sequence for sequence in decodes if sequence.request in chosen]


def _is_behind(prefills: Series[Sequence], waiting: Iterable[Sequence], decodes: Series[Sequence], tenants: Tenants) -> bool:
    """Whether the next prompt is of a tenant that was served no more than any of those that decode."""
    following = prefills[0] if prefills else next(iter(waiting), None)
    if following is None:
        return False
    others = {sequence.tenant for sequence in decodes} - {following.tenant}
    return bool(others) and tenants.served(following.tenant) <= min(map(tenants.served, others))


def budget_of_decodes(budget: int) -> int:
    """What decodes may take of it while others have prompts to compute."""
    return budget - budget // 4


def spare_for_drafts(budget: int, decodes: int) -> int:
    """Tokens of the budget that each decode may have for drafts."""
    return max(0, budget - decodes) // max(1, decodes)


def drafts_of(sequence: Sequence, spare: int, coming: int) -> int:
    """Drafts to verify in a step by whose end at least `coming` more tokens will have been emitted."""
    return max(0, min(sequence.lookahead, spare, sequence.limit - len(sequence.tokens) - coming))


def _admit(
    decision: Decision,
    ledger: Ledger,
    prefills: list[Sequence],
    waiting: Iterable[Sequence],
    places: int,
    available: int,
    budget: int,
) -> tuple[int, int]:
    """Add newcomers to `decision` in the order of `waiting`, until places, pages or the budget run out. The pages that they need, and what
    is left of the budget."""
    size, taken = ledger.page_size, 0
    for sequence in prefills:
        planned = next((length for other, length in decision.run if other is sequence), 0)
        held = max(len(sequence.pages), ledger.pages_for(sequence.computed + planned))
        available -= _pages_to_start(ledger, sequence) - held
    leaving = Counter(node.page for victim in decision.preempt for node in victim.nodes)
    """How many of those who use a cached page are to be preempted."""
    coming = {link for sequence in prefills for link in sequence.chain(size)[sequence.computed // size :]}
    locked: set[int] = set()
    passed_over = 0
    for sequence in waiting:
        if places <= 0 or budget <= 0 or passed_over == MOST_PASSED_OVER:
            break
        if sequence.suspect:
            break  # there was no room for it alone, and in company it must not run
        path = ledger.match_path(sequence)
        most = sequence.may_match // size
        if len(path) < most and sequence.chain(size)[len(path)] in coming:
            passed_over += 1
            continue
        idle = [node.page for node in path if node.users == leaving[node.page] and node.page not in locked]
        pages = _pages_to_start(ledger, sequence) - len(path) + len(idle)
        if pages > available:
            break
        available -= pages
        taken += pages
        locked.update(idle)
        places -= 1
        length = min(len(sequence.tokens) - len(path) * size, budget)
        budget -= length
        coming.update(sequence.chain(size)[len(path) :])
        decision.start.append(sequence)
        decision.run.append((sequence, length))
        decision.lookahead.append(0)
    return taken, budget


def _pages_to_start(ledger: Ledger, sequence: Sequence) -> int:
    """Pages for all known tokens, and for the first that is still to come if one is."""
    return ledger.pages_for(len(sequence.tokens) + (sequence.max_tokens > 0))
