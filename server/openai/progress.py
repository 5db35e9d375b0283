"""How far a streamed answer is, as the ids of its events tell and as a client that lost its connection tells back.

id: 17            one choice: 17 of its tokens are in this event and those before it
id: 12,9e,,3@40   four choices; the second has ended, of the third nothing was sent yet; of the fourth the text of 40 characters
                  was scored (`logprobs.text_offset`)
"""

import re
from typing import NamedTuple

from headrace.server.openai.errors import Refusal


class Place(NamedTuple):
    """Of one choice."""

    tokens: int = 0
    offset: int = 0
    """Characters of the tokens whose scores were sent."""
    ended: bool = False
    begun: bool = False
    """The client has at least one event of it."""


_PLACE = re.compile(r"(\d{1,9})(?:@(\d{1,9}))?(e?)")


class Progress:
    """Of all choices of one answer. `last_id` is the id of the last event that the client has, None for an answer that begins."""

    def __init__(self, choices: int, last_id: str | None = None) -> None:
        parts = [""] * choices if last_id is None else last_id.split(",")
        if len(parts) != choices:
            raise Refusal(f"Last-Event-ID {last_id!r:.80} is of {len(parts)} choices, the answer has {choices}", "Last-Event-ID")
        self._begun = [self._parse(part) for part in parts]
        self._ids = [part.encode() for part in parts]

    def of(self, choice: int) -> Place:
        """Where the choice began, or is to go on."""
        return self._begun[choice]

    def line(self, choice: int, tokens: int, offset: int, ended: bool) -> bytes:
        """The `id:` line of an event that brings the choice so far."""
        self._ids[choice] = b"%d%b%b" % (tokens, b"@%d" % offset if offset else b"", b"e" if ended else b"")
        return b"id: %b\n" % b",".join(self._ids)

    @staticmethod
    def _parse(part: str) -> Place:
        if not part:
            return Place()
        found = _PLACE.fullmatch(part)
        if found is None:
            raise Refusal(f"Last-Event-ID has the part {part!r:.40}: send the id of the last event as it came", "Last-Event-ID")
        return Place(int(found[1]), int(found[2] or 0), bool(found[3]), begun=True)
