"""Requests that are kept for a while after they ended or lost their reader: a stream that broke can go on from here.

    ended, aborted, frontend dead ─▶ put ─▶ { (tenant, answer): requests }, for KEPT_S ─▶ find ─▶ a frontend submits them again

A request is a pure function of its prompt, parameters, seed and tokens, so nothing runs on for a reader that may never return: what is
kept is a record, and going on means to compute again what is not in it.
"""

import time
from collections import OrderedDict

import msgspec

from headrace.engine.messages.frontend import Kept, TokenPrompt
from headrace.tokenizer_proc.live import Live

KEPT_S = 60.0
"""Seconds for which an answer can be recalled."""

MOST_BYTES = 64 << 20
"""About what all records together may take; the oldest go first."""

_BYTES_A_TOKEN = 8


class Shelf:
    def __init__(self) -> None:
        self._answers: OrderedDict[tuple[str, str], tuple[float, dict[int, Kept]]] = OrderedDict()
        """By tenant and answer, the oldest first: until when (monotonic seconds), and its requests."""
        self._bytes = 0

    def put(self, live: Live) -> None:
        """Keep a request as far as it came; nothing happens to one whose frontend left no notes."""
        generate = live.generate
        if not generate.notes:
            return
        now = time.monotonic()
        one = msgspec.structs.replace(
            generate,
            requests=(live.request,),
            seeds=(generate.seeds[live.place],),
            prompt=TokenPrompt(tuple(live.submit.prompt)),
            emitted=(tuple(live.tokens),),
            first_choice=generate.first_choice + live.place,
        )
        key = generate.tenant, generate.answer
        _, requests = self._answers.pop(key, (0.0, {}))
        if known := requests.get(live.request):
            self._bytes -= _size(known)
        requests[live.request] = kept = Kept(one, live.end)
        self._bytes += _size(kept)
        self._answers[key] = now + KEPT_S, requests
        while self._answers and (self._bytes > MOST_BYTES or next(iter(self._answers.values()))[0] < now):
            _, (_, gone) = self._answers.popitem(last=False)
            self._bytes -= sum(map(_size, gone.values()))

    def find(self, tenant: str, answer: str) -> list[Kept]:
        """The requests of an answer."""
        until, requests = self._answers.get((tenant, answer), (0.0, {}))
        return list(requests.values()) if time.monotonic() <= until else []


def _size(kept: Kept) -> int:
    generate = kept.generate
    assert isinstance(generate.prompt, TokenPrompt)
    return len(generate.notes) + _BYTES_A_TOKEN * (len(generate.prompt.ids) + sum(map(len, generate.emitted)))
