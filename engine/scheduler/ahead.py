"""Whether the step after the one in flight is known before its result is: then its plan can be sent ahead.

It is while nothing but decoding goes on: what the step in flight runs goes on with a token more, whatever the tokens are that it gives.
Pure functions of what `plan` sees, called by the scheduler as soon as a plan has been sent.
"""

from collections.abc import Sequence as Series
from operator import attrgetter

from headrace.engine.ledger.ledger import Row
from headrace.engine.scheduler.plan import ALONE, budget_of_decodes, drafts_of, spare_for_drafts
from headrace.engine.scheduler.step import Situation


def plan_ahead(now: Situation, rows: Series[Row]) -> list[int] | None:
    """Whether what a step in flight runs can go on with one more token each, whatever its result may be; and if so, how many drafts each
    of its `rows` may have verified (none at all for an empty list).

    None when the next step cannot be known yet: something else than decoding goes on, or decodes take turns, or pages could run out even if
    every draft in flight proves right, or every next token is sure to be the last, or one of those that wait may get a place. If an
    unforeseen end gives it one, it gets it a step later than it could.
    """
    ledger, limits = now.ledger, now.limits
    if len(rows) != len(now.running) or not all(map(attrgetter("emits"), rows)):
        return None
    if now.shared and now.speed is not None and len(rows) > now.speed.decodes(ALONE):
        return None
    budget = limits.max_step_tokens
    if now.waiting:
        budget = budget_of_decodes(budget)
        if len(rows) > budget or not _nobody_can_start(now, rows):
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


def _nobody_can_start(now: Situation, rows: Series[Row]) -> bool:
    """Whether those that wait find no place after the step in flight: all are taken, none is sure or likely to become free, and no tenant
    has to make place for another."""
    if len(rows) < now.limits.max_running or (now.tenants is not None and now.tenants.live > 1):
        return False
    return min([row.sequence.limit - len(row.sequence.tokens) - row.lookahead for row in rows]) > 1
