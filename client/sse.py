"""Server-sent events, read incrementally: bytes go in as they come from the network, whole events come out.

    b"data: {…}\\n\\nda" ──▶ feed ──▶ [Event(b"{…}")]      (b"da" waits for its line's end)

The format is that of the WHATWG HTML standard, section 9.2.6: lines end in LF, CR or CRLF, a line that starts with a colon is a comment,
several `data` lines are joined by LF, an empty line dispatches. Input may be split anywhere, within a CRLF or a UTF-8 character too.
The client library and the load generator read with this; it never decodes JSON and never waits.
"""

import re

import msgspec

MAX_EVENT_BYTES = 64 << 20
"""An event may not grow beyond this: a server that never ends a line would otherwise fill our memory."""

_LINE_END = re.compile(rb"\r\n|\n|\r")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Event(msgspec.Struct, frozen=True):
    """One dispatched event."""

    data: bytes
    """All `data` lines, joined by LF."""
    event: str = "message"
    id: str | None = None
    """The last event id seen on the stream, this event's own or an earlier one's."""


class EventTooLong(ValueError):
    """An event exceeded `MAX_EVENT_BYTES` without an end."""


class Parser:
    """The state between two pieces of one stream. Use a new one for each response."""

    __slots__ = ("_data", "_data_size", "_event", "_first_line", "_id", "_pending", "_pending_size", "_skip_line_feed", "retry_ms")

    def __init__(self) -> None:
        self.retry_ms: int | None = None
        """The reconnection time the server asked for, in milliseconds."""
        self._pending: list[bytes] = []
        self._data: list[bytes] = []
        self._event = ""
        self._id: str | None = None
        self._pending_size = 0
        self._data_size = 0
        self._first_line = True
        self._skip_line_feed = False

    def feed(self, piece: bytes) -> list[Event]:
        """The events that `piece` completes, in order. Raises `EventTooLong`.

        What is left when a stream ends is an event without its empty line; the standard drops it, and so do we.
        """
        if self._skip_line_feed and piece:
            # The last piece ended in CR, which ended its line; a LF now belongs to it.
            self._skip_line_feed = False
            if piece[0] == 0x0A:
                piece = piece[1:]
        if not piece:
            return []
        has_return = b"\r" in piece
        if not has_return and b"\n" not in piece:
            self._pending.append(piece)
            self._pending_size += len(piece)
            self._check_size()
            return []
        self._skip_line_feed = piece.endswith(b"\r")
        whole = b"".join([*self._pending, piece]) if self._pending else piece
        lines = _LINE_END.split(whole) if has_return else whole.split(b"\n")
        rest = lines.pop()
        self._pending = [rest] if rest else []
        self._pending_size = len(rest)
        events: list[Event] = []
        for line in lines:
            self._take(line, events)
        self._check_size()
        return events

    def _check_size(self) -> None:
        if self._pending_size + self._data_size > MAX_EVENT_BYTES:
            raise EventTooLong(f"a server-sent event has passed {MAX_EVENT_BYTES} bytes without an end")

    def _take(self, line: bytes, events: list[Event]) -> None:
        if self._first_line:
            self._first_line = False
            line = line.removeprefix(_BYTE_ORDER_MARK)
        if not line:
            if self._data:
                events.append(Event(b"\n".join(self._data), self._event or "message", self._id))
                self._data = []
                self._data_size = 0
            self._event = ""
            return
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
            self._data_size += len(value)
        elif name == b"event":
            self._event = value.decode("utf-8", "replace")
        elif name == b"id":
            if b"\0" not in value:
                self._id = value.decode("utf-8", "replace")
        elif name == b"retry" and value.isdigit():
            self.retry_ms = int(value)
