"""The ledger proper: a replicated state machine over plans and results.

Every worker rank and the scheduler hold one. Each applies `Plan k`, then commits `StepResult k`, then plan k+1, …; the page
tables follow, and nothing else decides them. A digest over every page that changed hands, every token emitted and the place where every row
starts shows whether two ledgers agree.

    apply(plan)      abort ─ preempt ─ admit ─ for each that runs: match the cache, take pages ──▶ rows to compute
    commit(result)   for each row: emitted tokens are appended, full pages enter the tree, ended requests are released

Because a commit comes only after the step's computation, and the next plan only after it, no page is ever freed under a step that
reads it.
"""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from itertools import compress, repeat, zip_longest

import msgspec

from headrace.engine.ledger.pages import PagePool
from headrace.engine.ledger.radix import Node, RadixTree
from headrace.engine.ledger.sequence import Sequence
from headrace.engine.messages.steps import Admit, Begin, Plan, StepResult


class LedgerError(Exception):
    """A plan or result that does not fit the ledger: its sender and this process disagree on the state."""


class Row(msgspec.Struct, frozen=True, gc=False):
    """Work of one request in one step: tokens `start … start + length - 1` of its sequence."""

    sequence: Sequence
    start: int
    length: int
    emits: bool
    """Whether a token is sampled at the end of the row."""
    lookahead: int = 0
    """How many further positions have pages: those of tokens that may be drafted and verified behind the row."""


@dataclass(frozen=True, slots=True)
class Ended:
    sequence: Sequence
    reason: str
    """"stop", "length" or "error"."""


class Ledger:
    """Requests, pages and prefixes of one epoch."""

    def __init__(self, begin: Begin) -> None:
        self.page_size = begin.page_size
        self.pool = PagePool(begin.pages)
        self.tree = RadixTree(begin.page_size)
        self.sequences: dict[int, Sequence] = {}
        self.step = 0
        """Number of the next plan."""
        self.digest = 0
        self._prefix_cache = begin.prefix_cache
        self._end_tokens = frozenset(begin.end_tokens)
        self._rows: list[Row] | None = None
        """Those whose result is due."""
        self._before: list[Row] = []
        """Those of the step before that emitted."""
        self._events = array("q")

    @property
    def available(self) -> int:
        """Pages that a plan may take: free ones and idle cached ones."""
        return len(self.pool) + self.tree.idle

    def pages_for(self, tokens: int) -> int:
        """Pages that hold this many tokens."""
        return -(-tokens // self.page_size)

    def sequence_of(self, admit: Admit) -> Sequence:
        """The sequence that `admit` describes, not yet part of the ledger."""
        sampling = admit.sampling
        ends = frozenset(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            ends |= self._end_tokens
        return Sequence(admit.request, admit.prompt, admit.emitted, sampling, admit.seed, ends)

    def apply(self, plan: Plan) -> list[Row]:
        """Take one plan; the rows to compute, in the plan's order. `LedgerError` when it does not fit."""
        if plan.step != self.step or self._rows is not None:
            raise LedgerError(f"plan {plan.step} came where {'result' if self._rows is not None else 'plan'} {self.step} was due")
        if plan.digest != self.digest and not plan.ahead:
            raise LedgerError(f"digest {self.digest:x} before step {plan.step}, the scheduler has {plan.digest:x}")
        for request in plan.abort:
            self.release(request)
        for request in plan.preempt:
            self._rewind(self._sequence(request))
        for admit in plan.admit:
            if admit.request in self.sequences:
                raise LedgerError(f"request {admit.request:x} admitted twice")
            self.sequences[admit.request] = self.sequence_of(admit)
            self._events.extend((1, admit.request & 0x7FFFFFFFFFFFFFFF))
        self._rows = self._go_on(plan) if plan.ahead else self._run(plan)
        self._events.extend([row.start for row in self._rows])
        self._seal()
        return self._rows

    def commit(self, result: StepResult) -> list[Ended]:
        """Take the result of the plan applied last; the requests that it ended, already released."""
        if result.step != self.step or self._rows is None:
            raise LedgerError(f"result {result.step} came where {'plan' if self._rows is None else 'result'} {self.step} was due")
        if sum(result.counts) != len(result.tokens):
            raise LedgerError(f"result {result.step} counts {sum(result.counts)} tokens and has {len(result.tokens)}")
        rows, self._rows = self._rows, None
        self._before = emitting = [row for row in rows if row.emits]
        if [row.sequence.request for row in emitting] != result.requests:
            due = [row.sequence.request for row in emitting]
            wrong = next((one, other) for one, other in zip_longest(result.requests, due) if one != other)
            raise LedgerError("result {} has tokens of {}, those of {} were due".format(result.step, *wrong))
        ended: list[Ended] = []
        self._events.extend(result.tokens)
        if result.counts.count(1) == len(emitting):
            self._take_one_each(emitting, result.tokens, ended)
        else:
            self._take_several(emitting, result, ended)
        if len(emitting) < len(rows):
            for row in rows:
                if not row.emits:
                    self._computed(row, ended)
        self.step += 1
        self._seal()
        return ended

    def release(self, request: int) -> None:
        """Forget a request and give back its pages; nothing happens when it is not (or no longer) known."""
        sequence = self.sequences.pop(request, None)
        if sequence is not None:
            self._rewind(sequence)

    def match_path(self, sequence: Sequence) -> list[Node]:
        """The cached pages that `sequence` would start from now. Changes nothing."""
        return self.tree.match(sequence.tokens, sequence.may_match // self.page_size) if self._prefix_cache else []

    def pages_freed_by(self, sequence: Sequence) -> int:
        """Pages that become available when `sequence` is preempted."""
        own = len(sequence.pages) - len(sequence.nodes)
        return own + sum(node.users == 1 for node in sequence.nodes)

    def check(self) -> None:
        """Prove the invariants: every page is in exactly one place, and every count is what it counts."""
        seen: dict[int, str] = {}

        def place(page: int, where: str) -> None:
            assert 0 <= page < self.pool.total, f"page {page} in {where} does not exist"
            assert page not in seen, f"page {page} is in {seen.get(page)} and in {where}"
            seen[page] = where

        for page in self.pool.pages():
            place(page, "the free pages")
        users: dict[int, int] = {}
        for sequence in self.sequences.values():
            nodes = sequence.nodes
            assert sequence.pages[: len(nodes)] == [node.page for node in nodes], f"table of {sequence.request} differs from its nodes"
            for parent, node in zip([self.tree.root, *nodes], nodes, strict=False):
                assert node.parent is parent, f"nodes of {sequence.request} are no path"
            for index, node in enumerate(nodes):
                key = tuple(sequence.tokens[index * self.page_size : (index + 1) * self.page_size])
                assert node.key == key, f"page {node.page} of {sequence.request} holds other tokens"
                users[id(node)] = users.get(id(node), 0) + 1
            for page in sequence.pages[len(nodes) :]:
                place(page, f"request {sequence.request}")
            assert len(sequence.pages) >= self.pages_for(sequence.computed), f"{sequence.request} computed more than its pages hold"
        count = idle = 0
        for node in self.tree.nodes():
            place(node.page, "the tree")
            count += 1
            idle += node.users == 0
            assert node.users == users.get(id(node), 0), f"page {node.page} has {node.users} users, {users.get(id(node), 0)} tables"
        assert (count, idle) == (self.tree.size, self.tree.idle), "the tree's counts are off"
        assert len(seen) == self.pool.total, f"{self.pool.total - len(seen)} pages are nowhere"

    def _run(self, plan: Plan) -> list[Row]:
        """The rows of the requests that a plan names."""
        if not len(plan.run) == len(plan.lengths) == len(plan.lookahead or plan.run):
            raise LedgerError(f"the columns of plan {plan.step} differ in length")
        try:
            running = list(map(self.sequences.__getitem__, plan.run))
        except KeyError as missing:
            raise LedgerError(f"request {missing.args[0]:x} is not in the ledger") from None
        # All matches come before any eviction, so that no row of this plan evicts what a later one counts on.
        for sequence in running:
            if not sequence.pages:
                self._match(sequence)
        return self._grow(running, plan.lengths, plan.lookahead or repeat(0))

    def _go_on(self, plan: Plan) -> list[Row]:
        """The rows of the step before, a token further. Those that it ended have no pages any more."""
        before = [row.sequence for row in self._before]
        if not plan.lookahead:
            # Most steps of most engines. `_grow` would come to the same, in twice the time.
            rows, size = [], self.page_size
            for sequence in before:
                pages = sequence.pages
                if pages:
                    start = sequence.computed
                    if start == len(pages) * size:
                        pages.append(page := self._take())
                        self._events.append(page)
                    rows.append(Row(sequence, start, 1, True))
            return rows
        if len(plan.lookahead) != len(before):
            raise LedgerError(f"plan {plan.step} has drafts for {len(plan.lookahead)} rows, the step before had {len(before)}")
        there = [bool(sequence.pages) for sequence in before]
        return self._grow(list(compress(before, there)), repeat(1), compress(plan.lookahead, there))

    def _sequence(self, request: int) -> Sequence:
        try:
            return self.sequences[request]
        except KeyError:
            raise LedgerError(f"request {request:x} is not in the ledger") from None

    def _match(self, sequence: Sequence) -> None:
        """Start from what the cache has."""
        path = self.match_path(sequence)
        self.tree.use(path, self.step)
        sequence.nodes = path
        sequence.pages = [node.page for node in path]
        sequence.computed = sequence.cached = len(path) * self.page_size
        self._events.extend(sequence.pages)

    def _grow(self, running: list[Sequence], lengths: Iterable[int], lookaheads: Iterable[int]) -> list[Row]:
        """Make room in each sequence for `length` more tokens, and for as many drafts behind them as it could still emit."""
        rows = []
        size, step = self.page_size, self.step
        for sequence, length, lookahead in zip(running, lengths, lookaheads, strict=False):
            start, known = sequence.computed, len(sequence.tokens)
            end = start + length
            if length <= 0 or end > known:
                raise LedgerError(f"{length} tokens to compute of request {sequence.request:x}, which has {sequence.remaining}")
            emits = end == known and sequence.max_tokens > 0
            if lookahead:
                lookahead = min(lookahead, sequence.limit - known - 1) if emits else 0
            if len(sequence.pages) * size < end + lookahead:
                pages = [self._take() for _ in range(self.pages_for(end + lookahead) - len(sequence.pages))]
                sequence.pages += pages
                self._events.extend(pages)
            sequence.last_run = step
            rows.append(Row(sequence, start, length, emits, lookahead))
        return rows

    def _take_one_each(self, emitting: list[Row], emitted: list[int], ended: list[Ended]) -> None:
        """Each of the rows emitted one token."""
        size = self.page_size
        for row, token in zip(emitting, emitted, strict=True):
            sequence = row.sequence
            tokens = sequence.tokens
            sequence.computed = computed = len(tokens)
            tokens.append(token)
            if computed // size > len(sequence.nodes):
                self._publish(sequence)
            if (computed + 1 >= sequence.limit or token in sequence.end_tokens) and (reason := sequence.ends_with(token)):
                ended.append(Ended(sequence, reason))
                self.release(sequence.request)

    def _take_several(self, emitting: list[Row], result: StepResult, ended: list[Ended]) -> None:
        """Each of the rows emitted as many tokens as the result counts."""
        position = 0
        for row, count in zip(emitting, result.counts, strict=True):
            sequence = row.sequence
            if count > row.lookahead + 1:
                due = row.lookahead + 1
                raise LedgerError(f"result {result.step} has {count} tokens of {sequence.request}, which had room for {due}")
            # A row that was to emit and did not has failed: the model gave nothing to choose from.
            computed, reason = len(sequence.tokens), None if count else "error"
            # The row's own last token gave the first; each further one was a draft, which is computed by now.
            for token in result.tokens[position : position + count]:
                computed = len(sequence.tokens)
                sequence.tokens.append(token)
                if reason := sequence.ends_with(token):
                    break
            position += count
            sequence.computed = computed
            self._publish(sequence)
            if reason:
                ended.append(Ended(sequence, reason))
                self.release(sequence.request)

    def _computed(self, row: Row, ended: list[Ended]) -> None:
        """A row that emits nothing is computed: part of a prompt, or the whole of one that was only to be scored."""
        sequence = row.sequence
        sequence.computed = row.start + row.length
        self._publish(sequence)
        if sequence.computed == len(sequence.tokens):
            ended.append(Ended(sequence, "length"))
            self.release(sequence.request)

    def _take(self) -> int:
        if len(self.pool):
            return self.pool.take()
        page = self.tree.evict()
        if page is None:
            raise LedgerError(f"no page is left for step {self.step}")
        return page

    def _publish(self, sequence: Sequence) -> None:
        """Move pages that have become full into the tree. Where the same tokens are there already, use that page and free the own."""
        if not self._prefix_cache:
            return
        size = self.page_size
        nodes = sequence.nodes
        for index in range(len(nodes), sequence.computed // size):
            parent = nodes[-1] if nodes else self.tree.root
            own = sequence.pages[index]
            key = tuple(sequence.tokens[index * size : (index + 1) * size])
            node, new = self.tree.extend(parent, key, own, self.step)
            nodes.append(node)
            if not new:
                sequence.pages[index] = node.page
                self.pool.give(own)
                self._events.extend((own, node.page))

    def _rewind(self, sequence: Sequence) -> None:
        """Give back all pages; what is in the tree stays cached."""
        self._events.extend((2, sequence.request & 0x7FFFFFFFFFFFFFFF))
        for page in reversed(sequence.pages[len(sequence.nodes) :]):
            self.pool.give(page)
        self.tree.drop(sequence.nodes, self.step)
        sequence.nodes = []
        sequence.pages = []
        sequence.computed = 0

    def _seal(self) -> None:
        """Mix what happened into the digest."""
        mixed = blake2b(self.digest.to_bytes(8, "little"), digest_size=8)
        mixed.update(self._events.tobytes())
        self.digest = int.from_bytes(mixed.digest(), "little")
        del self._events[:]
