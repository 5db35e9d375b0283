"""Who of the supervisor's children hangs.

    ready      asked for a sign of life now and then; the scheduler's tells for how long its workers have owed it a step
    starting   may take as long as it takes to read a model, and cannot answer: whether it computes or reads is seen from outside

Who gave none for `limit` seconds is put down. The fork server mostly waits; but if it was stopped nobody would be started any more.
"""

import asyncio
import time
from collections.abc import Callable, Mapping

from headrace.engine.actor import Post
from headrace.engine.children import WORKERS, Child
from headrace.engine.fork_server import ForkServer
from headrace.engine.messages.lifecycle import Probe, Snapshot

PULSES = 4
"""Signs of life that are asked for within the time in which one must come."""

PULSE = -1
"""The call of a `Probe` that asks for a sign of life."""


class Pulse:
    """Watches `children`; `put_down` is told which of them hangs, and why one thinks so."""

    def __init__(
        self, post: Post, children: Mapping[str, Child], limit: float, put_down: Callable[[Child, str], None], forks: ForkServer
    ) -> None:
        self._post = post
        self._children = children
        self._limit = limit
        self._put_down = put_down
        self._forks = forks

    async def feel_all(self) -> None:
        """Again and again, without end."""
        interval = self._limit / PULSES
        asked = time.monotonic()
        while True:
            await asyncio.sleep(interval)
            now = time.monotonic()
            # Where this process itself stood still, answers may lie unread.
            late, asked = now - asked > 2 * interval, now
            if self._forks.stands_still():
                self._forks.kill()
            self._forks.bury_strangers(lambda: {child.pid for child in self._children.values() if child.pid})
            self._watch_starts(now, late)
            for child in self._children.values():
                if child.state == "ready":
                    self._ask(child, now, late)

    def felt(self, snapshot: Snapshot) -> None:
        """A sign of life; the scheduler's tells of its workers too."""
        self._children[snapshot.child].owes_since = None
        owed = snapshot.progress.owed_s if snapshot.progress else None
        if owed is not None and owed > self._limit:
            for child in self._children.values():
                if child.spec.group == WORKERS and child.state == "ready":
                    self._hangs(child, f"a step has not ended for {owed:.1f} s")

    def _ask(self, child: Child, now: float, late: bool) -> None:
        if late:
            child.owes_since = None
        elif child.owes_since is not None and now - child.owes_since > self._limit:
            self._hangs(child, f"it gave no sign of life for {now - child.owes_since:.1f} s")
            return
        child.owes_since = child.owes_since or now
        self._post.send(child.spec.name, Probe(PULSE))

    def _watch_starts(self, now: float, late: bool) -> None:
        starting = [child for child in self._children.values() if child.state != "ready" and child.pid is not None]
        # One of a group may wait for the others.
        at_work = {child.spec.group for child in starting if child.moves()}
        for child in starting:
            if late or child.spec.group in at_work:
                child.still_since = None
            elif child.still_since is not None and now - child.still_since > self._limit:
                self._hangs(child, f"it has done nothing for {now - child.still_since:.1f} s, and is not ready yet")
            else:
                child.still_since = child.still_since or now

    def _hangs(self, child: Child, what: str) -> None:
        child.owes_since = None
        child.hangs += 1
        self._put_down(child, what)
