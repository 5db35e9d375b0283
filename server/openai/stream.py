"""Answers that stream: each token becomes a chunk the moment it comes.

All but the text of a chunk is the same for every token of a choice, so it is encoded once; a token costs one JSON string, two
concatenations and one write.

    id: 17
    data: {"id":…,"choices":[{"index":0,"delta":{"content":  "text"  },"logprobs":null,"finish_reason":null}]}
    └───────────────────── before ──────────────────────────┘      └────────────── after ────────────────────┘

An event's id says how far the answer is with it (see `progress.py`), which is all that a client needs to go on after a break.
"""

from collections.abc import Callable

import msgspec
from aiohttp import web

from headrace.engine.messages.frontend import Accepted, End, Failed, PromptScores, Scores, TokenScore
from headrace.engine.messages.openai.responses import Usage
from headrace.server.meters import Timing
from headrace.server.openai.choices import Answer, chat_logprobs, completion_logprobs, finish_reason, first_token
from headrace.server.openai.errors import Refusal
from headrace.server.openai.progress import Progress
from headrace.server.sse import EventStream

_encode = msgspec.json.Encoder().encode


class Shape:
    """How the chunks of one endpoint look, around what a choice puts in."""

    def __init__(self, head: dict, chat: bool, include_usage: bool, want_top: bool) -> None:
        """`head` holds id, object, created, model and system_fingerprint."""
        self.chat = chat
        self.want_top = want_top
        self._head = _encode(head)[:-1]
        self._tail = b',"usage":null}\n\n' if include_usage else b"}\n\n"

    def before(self, index: int) -> bytes:
        """Up to the text."""
        opening = b'"delta":{"content":' if self.chat else b'"text":'
        return b'data: %b,"choices":[{"index":%d,%b' % (self._head, index, opening)

    def after(self, logprobs: bytes = b"null") -> bytes:
        """From the text on, as long as the choice has not ended."""
        return b'%b,"logprobs":%b,"finish_reason":null}]%b' % (b"}" if self.chat else b"", logprobs, self._tail)

    def role(self, index: int) -> bytes:
        """The chunk with which a chat choice begins."""
        choice = b'{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}' % index
        return b'data: %b,"choices":[%b]%b' % (self._head, choice, self._tail)

    def last(self, index: int, end: End) -> bytes:
        """The chunk that says why a choice ended."""
        empty = b'"delta":{}' if self.chat else b'"text":""'
        reason, stop = _encode(finish_reason(end)), _encode(end.stop)
        choice = b'{"index":%d,%b,"logprobs":null,"finish_reason":%b,"stop_reason":%b}' % (index, empty, reason, stop)
        return b'data: %b,"choices":[%b]%b' % (self._head, choice, self._tail)

    def usage(self, counts: Usage) -> bytes:
        """The chunk after all choices, with the token counts."""
        return b'data: %b,"choices":[],"usage":%b}\n\n' % (self._head, _encode(counts))


class StreamedChoice:
    """One continuation: a `Sink` that writes chunks. While the stream is full its text waits here, in one piece.

    `progress` knows what the client has already, of this choice as of the others.
    """

    def __init__(
        self, index: int, answer: Answer, timing: Timing, shape: Shape, progress: Progress, echo: bool, scored_prompt: bool
    ) -> None:
        begun = progress.of(index)
        self._progress = progress
        self._begun = begun
        self._tokens = begun.tokens
        """Tokens that came, those from before a break too."""
        self.finish: End | None = None
        self.prompt: Accepted | None = None
        self._index = index
        self._answer = answer
        self._timing = timing
        self._shape = shape
        self._echo = echo and not begun.begun
        self._held = scored_prompt and not begun.begun
        """The prompt's scores are still to come, and its text must not go before them."""
        self._first = ""
        """Text of the prompt's first token, which has no score."""
        self._before = shape.before(index)
        self._after = shape.after()
        self._stream: EventStream | None = None
        self._text = ""
        """Text that waits for room."""
        self._scores: list[TokenScore | None] = []
        self._offset = begun.offset
        """Characters of all tokens whose scores were written, for `text_offset`."""
        self._ended = begun.ended
        """Its last chunk was written."""

    def open(self, stream: EventStream) -> None:
        """Write what has come so far, then everything as it comes."""
        self._stream = stream
        if self._shape.chat and not self._begun.begun:
            stream.write(self._progress.line(self._index, 0, 0, False) + self._shape.role(self._index))
        self.flush()

    def accepted(self, message: Accepted) -> None:
        if self.prompt is None:
            self.prompt = message
            if self._echo:
                self._text = message.prompt_text or ""

    def prompt_scores(self, message: PromptScores) -> None:
        if not self._held:
            return  # told again by a tokenizer that took over
        self._answer.one_begun()
        self._scores = [*message.scores, *self._scores]
        if self.prompt:
            self._first = first_token(self.prompt, message.scores)
        self._held = False
        self.flush()

    def text(self, text: str, count: int, scores: Scores | None, now: float) -> None:
        self._answer.one_begun()
        if count:
            self._tokens += count
            self._timing.tokens(now)
        stream = self._stream
        if scores is None and not self._text and not self._scores and not self._held and stream is not None and not stream.full:
            if text:
                stream.write(self._id() + self._before + _encode(text) + self._after)
            return
        self._text += text
        if scores:
            self._scores.extend(scores.scores)
        self.flush()

    def end(self, message: End, now: float) -> None:
        self.finish = message
        self._answer.one_begun()
        self._timing.end(message, now)
        if self._ended:  # the client knew before it lost its connection
            self._answer.one_ended()
        self.flush()

    def failed(self, message: Failed) -> None:
        self._answer.one_failed(message)

    def flush(self) -> None:
        """Write what waits, if there is room."""
        stream = self._stream
        if stream is None or stream.full or self._ended or self._held:
            return
        if self._text or self._scores:
            logprobs = b"null"
            if self._scores:
                logprobs = _encode(self._logprobs())
            stream.write(self._id() + self._before + _encode(self._text) + self._shape.after(logprobs))
            self._text = ""
            self._scores = []
        if self.finish is not None and not stream.full:
            self._ended = True
            stream.write(self._id(ended=True) + self._shape.last(self._index, self.finish))
            self._answer.one_ended()

    def _id(self, ended: bool = False) -> bytes:
        return self._progress.line(self._index, self._tokens, self._offset, ended)

    def _logprobs(self) -> object:
        if self._shape.chat:
            return chat_logprobs([score for score in self._scores if score])
        found = completion_logprobs(self._scores, self._first, self._offset, self._shape.want_top)
        self._offset += sum(map(len, found.tokens))
        return found


async def stream_answer(
    request: web.Request,
    answer: Answer,
    choices: list[StreamedChoice],
    shape: Shape,
    counts: Callable[[], Usage] | None,
    headers: dict[str, str],
) -> web.StreamResponse:
    """Stream `choices` until all have ended. `counts` gives the usage for the last chunk, None sends none.

    Raises `Refusal` when a choice fails before one has anything to show: nothing has been sent then.
    """
    await answer.first_begun()

    def room() -> None:
        for choice in choices:
            choice.flush()

    stream = EventStream(request, room)
    await stream.open(headers)
    for choice in choices:
        choice.open(stream)
    try:
        await answer.all_done()
        last = b"data: [DONE]\n\n"
        if counts:
            last = shape.usage(counts()) + last
    except Refusal as refusal:
        last = b"data: %b\n\n" % refusal.body()
    await stream.close(last)
    return stream.response
