"""Whether the step after the one in flight is known before its result is: then its plan can be sent ahead.

It is while nothing but decoding goes on: what the step in flight runs goes on with a token more, whatever the tokens are that it gives.
Pure functions of what `plan` sees, called by the scheduler as soon as a plan has been sent.
"""

from collections.abc import Collection
from collections.abc import Sequence as Series
from operator import attrgetter

from headrace.engine.ledger.ledger import Ledger, Row
from headrace.engine.ledger.sequence import Sequence
from headrace.engine.scheduler.plan import ALONE, Limits, budget_of_decodes, drafts_of, spare_for_drafts
from headrace.engine.scheduler.speed import Speed
from headrace.engine.scheduler.tenants import Tenants


def plan_ahead(
    ledger: Ledger,
    rows: Series[Row],
    running: Series[Sequence],
    waiting: Collection[Sequence],
    limits: Limits,
    speed: Speed | None = None,
    tenants: Tenants | None = None,
    shared: bool = False,
) -> list[int] | None:
    """Whether what a step in flight runs can go on with one more token each, whatever its result may be; and if so, how many drafts each
    of its `rows` may have verified (none at all for an empty list). Arguments are those of `plan`.

    None when the next step cannot be known yet: something else than decoding goes on, or decodes take turns, or pages could run out even if
    every draft in flight proves right, or every next token is sure to be the last, or one of `waiting` may get a place. If an unforeseen
    end gives it one, it gets it a step later than it could.
    """
    if len(rows) != len(running) or not all(map(attrgetter("emits"), rows)):
        return None
    if shared and speed is not None and len(rows) > speed.decodes(ALONE):
        return None
    budget = limits.max_step_tokens
    if waiting:
        budget = budget_of_decodes(budget)
        if len(rows) > budget or not _nobody_can_start(rows, limits, tenants):
            return None
    elif not any(len(row.sequence.tokens) + 1 < row.sequence.limit for row in rows):
        return None
    if not limits.drafts and len(rows) <= ledger.available:
        return []  # whatever happens, none needs more than one page
    spare = spare_for_drafts(budget, len(rows))
    drafts, pages = [], 0
    for row in rows:
        sequence = row.sequence
        if len(sequence.tokens) + 1 >= sequence.limit:
            drafts.append(0)
            continue
        lookahead = drafts_of(sequence, spare, 2)
        drafts.append(lookahead)
        pages += max(0, ledger.pages_for(row.start + row.length + row.lookahead + 1 + lookahead) - len(sequence.pages))
    if pages > ledger.available:
        return None
    return drafts if any(drafts) else []


def _nobody_can_start(rows: Series[Row], limits: Limits, tenants: Tenants | None) -> bool:
    """Whether those that wait find no place after the step in flight: all are taken, none is sure or likely to become free, and no tenant
    has to make place for another."""
    if len(rows) < limits.max_running or (tenants is not None and tenants.live > 1):
        return False
    return not any(map(_may_reach_its_limit, rows))


def _may_reach_its_limit(row: Row) -> bool:
    return len(row.sequence.tokens) + 1 + row.lookahead >= row.sequence.limit
