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
from collections.abc import Iterable
from collections.abc import Sequence as Series
from dataclasses import dataclass
from operator import attrgetter

from headrace.engine.ledger.ledger import Ledger
from headrace.engine.ledger.sequence import Sequence
from headrace.engine.scheduler.step import Decision, Situation, Step
from headrace.engine.scheduler.tenants import Tenants

ALONE, BESIDE, AHEAD = 0.8, 0.5, 0.25
"""What part of a step's time decodes may take where tenants share: alone, beside prompts, and beside those of a tenant served less."""
AHEAD_STEP = 2.0
"""How many times as long as other steps one with such a prompt may be, where decodes take turns: its first token comes sooner, and theirs
have longer pauses anyway."""

MOST_PASSED_OVER = 64
"""Waiting requests that a step looks past because they wait for a prefix."""


@dataclass(slots=True)
class _Queues:
    """Who could run, sorted by what the step has for them."""

    decodes: list[Sequence]
    """With one token to compute."""
    prompts: list[Sequence]
    """That have begun."""
    later: list[Sequence]
    """Prompts that have begun as well, and come after one of a tenant that was served less and has not."""
    starting: bool
    """Whether one of those that wait may start."""


@dataclass(slots=True)
class _Part:
    """What decodes get of the step."""

    tokens: int
    """Drafts included."""
    decodes: int
    """How many of them run at most."""
    yields: bool
    """Whether they are many, and the step is one for the prompt of a tenant that was served less."""

    @property
    def stretch(self) -> float:
        """How many times as long as others the step may take."""
        return AHEAD_STEP if self.yields else 1.0


def plan(now: Situation) -> Decision:
    """Decide one step."""
    if alone := _suspect_alone(now):
        return alone
    tenants = now.tenants if now.tenants is not None and now.tenants.live > 1 else None
    step = Step(now, _make_place(now, tenants) if tenants and now.waiting else [])
    queues = _sort(now, step.left, tenants)
    part = _part_of_decodes(now, queues, tenants)
    decodes = queues.decodes if len(queues.decodes) <= part.decodes else _take_turns(queues.decodes, part.decodes, tenants)
    _decode(step, decodes, spare_for_drafts(part.tokens, len(decodes)))

    def bound(context: int) -> None:
        """Leave no more of the budget than a chunk behind so many places may have beside the decodes."""
        if now.speed is not None and decodes:
            seen = sum([sequence.computed for sequence in decodes])
            step.budget = min(step.budget, now.speed.chunk(len(decodes), seen, step.budget, context, part.stretch))

    if queues.prompts:
        bound(queues.prompts[0].computed)
        _go_on(step, queues.prompts)
    if now.waiting and step.budget and not step.short:
        if not queues.prompts:
            bound(0)
        _admit(step, queues, tenants)
    if queues.later and not (part.yields and step.decision.start):
        bound(queues.later[0].computed)
        _go_on(step, queues.later)
    return step.decision


def _due(sequence: Sequence, tenants: Tenants | None) -> tuple[int, float]:
    """Whose prompt comes first: the lower."""
    return sequence.priority, tenants.served(sequence.tenant) if tenants else 0.0


def _sort(now: Situation, left: list[Sequence], tenants: Tenants | None) -> _Queues:
    """Sort those that run. Where there are several tenants, prompts that have begun come in their order, and behind a newcomer's."""
    prompts = [sequence for sequence in left if len(sequence.tokens) - sequence.computed != 1]
    decodes = [sequence for sequence in left if len(sequence.tokens) - sequence.computed == 1] if prompts else list(left)
    starting = bool(now.waiting) and len(left) < now.limits.max_running
    later: list[Sequence] = []
    if tenants:
        prompts.sort(key=lambda sequence: (*_due(sequence, tenants), sequence.arrived))
        if starting and prompts:
            head = _due(next(iter(now.waiting)), tenants)
            first = sum(_due(sequence, tenants) <= head for sequence in prompts)
            prompts, later = prompts[:first], prompts[first:]
    return _Queues(decodes, prompts, later, starting)


def _part_of_decodes(now: Situation, queues: _Queues, tenants: Tenants | None) -> _Part:
    """What decodes get of the budget; and of the time, where tenants share the engine and they are many."""
    tokens, prompts = now.limits.max_step_tokens, bool(queues.prompts) or queues.starting
    behind = tenants is not None and prompts and _is_behind(queues.prompts, now.waiting, queues.decodes, tenants)
    if behind:
        tokens //= 4
    elif queues.prompts or now.waiting:
        tokens = budget_of_decodes(tokens)
    if not now.shared or now.speed is None or len(queues.decodes) <= now.speed.decodes(ALONE):
        return _Part(tokens, tokens, False)
    most = now.speed.decodes(AHEAD if behind else BESIDE if prompts else ALONE)
    return _Part(tokens, min(tokens, most), behind)


def _decode(step: Step, decodes: list[Sequence], spare: int) -> None:
    """Have each of `decodes` compute its next token, and `spare` drafts at most. One without a page takes those of who came last."""
    ledger, size = step.now.ledger, step.now.ledger.page_size
    run, lookaheads = step.decision.run, step.decision.lookahead
    for sequence in decodes:
        if step.short and sequence.request in step.short:
            continue
        lookahead = 0
        # Most steps of most decodes need neither drafts nor a page.
        if sequence.lookahead or sequence.computed >= len(sequence.pages) * size:
            lookahead = drafts_of(sequence, spare, 1)
            pages = max(0, ledger.pages_for(sequence.computed + 1 + lookahead) - len(sequence.pages))
            if pages > step.available:
                lookahead = 0
                pages = max(0, ledger.pages_for(sequence.computed + 1) - len(sequence.pages))
                if pages > step.available and not step.make_room(sequence, pages):
                    continue
            step.available -= pages
        run.append((sequence, 1))
        lookaheads.append(lookahead)
    step.budget -= len(run) + sum(lookaheads)


def _go_on(step: Step, prompts: list[Sequence]) -> None:
    """Compute a chunk of each prompt that has begun, as far as budget and pages go."""
    ledger = step.now.ledger
    for sequence in prompts:
        if sequence.request in step.short or step.budget == 0:
            continue
        room = (len(sequence.pages) + step.available) * ledger.page_size - sequence.computed
        if room <= 0 and not step.decision.run:
            # Nothing else moves, so waiting for pages would be for ever.
            if not step.make_room(sequence, 1):
                continue
            room = (len(sequence.pages) + step.available) * ledger.page_size - sequence.computed
        length = min(sequence.remaining, step.budget, room)
        if length > 0:
            step.available -= ledger.pages_for(sequence.computed + length) - len(sequence.pages)
            step.run(sequence, length)


def _admit(step: Step, queues: _Queues, tenants: Tenants | None) -> None:
    """Start newcomers in their order, until places, pages or the budget run out."""
    now, decision = step.now, step.decision
    ledger, size = now.ledger, now.ledger.page_size
    places, available = now.limits.max_running - len(step.left), step.available
    begun = queues.prompts + queues.later
    for sequence in begun:
        planned = next((length for other, length in decision.run if other is sequence), 0)
        held = max(len(sequence.pages), ledger.pages_for(sequence.computed + planned))
        available -= _pages_to_start(ledger, sequence) - held
    leaving = Counter(node.page for victim in decision.preempt for node in victim.nodes)
    """How many of those who use a cached page are to be preempted."""
    coming = {link for sequence in begun for link in sequence.chain(size)[sequence.computed // size :]}
    locked: set[int] = set()
    passed_over = 0
    for sequence in now.waiting:
        if places <= 0 or step.budget <= 0 or passed_over == MOST_PASSED_OVER:
            break
        if queues.later and _due(sequence, tenants) >= _due(queues.later[0], tenants):
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
        step.available -= pages
        locked.update(idle)
        places -= 1
        coming.update(sequence.chain(size)[len(path) :])
        decision.start.append(sequence)
        step.run(sequence, min(len(sequence.tokens) - len(path) * size, step.budget))


def _suspect_alone(now: Situation) -> Decision | None:
    """A step for a suspect, if there is one that has pages or can have them."""
    ledger, running, limits = now.ledger, now.running, now.limits
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
    suspect = next(iter(now.waiting), None)
    if suspect is None or not suspect.suspect or len(running) >= limits.max_running:
        return None
    path = ledger.match_path(suspect)
    if _pages_to_start(ledger, suspect) - len(path) + sum(node.users == 0 for node in path) > ledger.available:
        return None
    length = min(len(suspect.tokens) - len(path) * ledger.page_size, limits.max_step_tokens)
    return Decision(start=[suspect], run=[(suspect, length)], lookahead=[0])


def _make_place(now: Situation, tenants: Tenants) -> list[Sequence]:
    """Who has to go so that the first who waits can start: the latest of the tenant with most places, while that has more than its share
    of them and the other's tenant less. Nobody, if that would not be enough."""
    ledger, running, limits, head = now.ledger, now.running, now.limits, next(iter(now.waiting))
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


def _pages_to_start(ledger: Ledger, sequence: Sequence) -> int:
    """Pages for all known tokens, and for the first that is still to come if one is."""
    return ledger.pages_for(len(sequence.tokens) + (sequence.max_tokens > 0))
