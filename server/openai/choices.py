"""The choices of an answer: what comes of each request id is gathered here, and turned into OpenAI's shapes.

DirectClient ──▶ Choice (a Sink each) ──▶ Answer ─▶ one JSON body          (`whole.py`)
                                                └─▶ chunks as they come    (`stream.py`)
"""

import asyncio
from collections.abc import Callable, Sequence

from headrace.engine.messages.frontend import Accepted, End, Failed, PromptScores, Scores, TokenScore
from headrace.engine.messages.openai.responses import (
    ChatLogprob,
    ChatLogprobs,
    CompletionLogprobs,
    PromptTokensDetails,
    TopLogprob,
    Usage,
)
from headrace.server.meters import Timing
from headrace.server.openai.errors import Refusal


class Answer:
    """All choices of one HTTP request: when the first begins, and when they are done."""

    def __init__(self, count: int) -> None:
        self._changed = asyncio.Event()
        self._refusal: Refusal | None = None
        self._begun = False
        self._unfinished = count

    @property
    def complete(self) -> bool:
        """Whether every choice has ended."""
        return self._unfinished == 0

    async def first_begun(self) -> None:
        """Wait until a choice has something to show. Raises the `Refusal` of one that failed before: a full queue is told by the answer's
        status, not within a stream that promised better."""
        await self._until(lambda: self._begun)

    async def all_done(self) -> None:
        """Wait until every choice has ended. Raises the `Refusal` of one that failed."""
        await self._until(lambda: self._unfinished == 0)

    def one_begun(self) -> None:
        if not self._begun:
            self._begun = True
            self._changed.set()

    def one_ended(self) -> None:
        self._unfinished -= 1
        self._changed.set()

    def one_failed(self, failed: Failed) -> None:
        self._refusal = self._refusal or Refusal.of(failed)
        self._changed.set()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            if self._refusal:
                raise self._refusal
            self._changed.clear()
            await self._changed.wait()


class Choice:
    """One continuation: a `Sink` that keeps everything, for an answer in one piece."""

    def __init__(self, index: int, answer: Answer, timing: Timing) -> None:
        self.index = index
        self.parts: list[str] = []
        self.scores: list[TokenScore] = []
        self.prompt: Accepted | None = None
        self.prompt_token_scores: tuple[TokenScore | None, ...] | None = None
        self.finish: End | None = None
        self._answer = answer
        self._timing = timing

    def accepted(self, message: Accepted) -> None:
        if self.prompt is None:
            self.prompt = message

    def prompt_scores(self, message: PromptScores) -> None:
        self.prompt_token_scores = message.scores

    def text(self, text: str, count: int, scores: Scores | None, now: float) -> None:
        if count:
            self._timing.tokens(now)
        self.parts.append(text)
        if scores:
            self.scores.extend(scores.scores)

    def end(self, message: End, now: float) -> None:
        self.finish = message
        self._timing.end(message, now)
        self._answer.one_ended()

    def failed(self, message: Failed) -> None:
        self._answer.one_failed(message)


def finish_reason(end: End) -> str:
    """The engine's reason in OpenAI's words; "abort" only reaches a client whose request was ended from outside."""
    return end.reason


def usage(choices: list[tuple[int, End]]) -> Usage:
    """Token counts of an answer, from (prompt number, end) of each choice: every prompt counts once, every completion too."""
    prompts = dict(reversed(choices))
    prompt_tokens = sum(end.prompt_tokens for end in prompts.values())
    completion_tokens = sum(end.completion_tokens for _, end in choices)
    cached = sum(end.cached_tokens for end in prompts.values())
    return Usage(prompt_tokens, prompt_tokens + completion_tokens, completion_tokens, PromptTokensDetails(cached))


def first_token(prompt: Accepted, scores: Sequence[TokenScore | None]) -> str:
    """Text of a prompt's first token: what its scored tokens do not account for."""
    text = prompt.prompt_text or ""
    return text[: max(0, len(text) - sum(len(score.text) for score in scores if score))]


def chat_logprobs(scores: list[TokenScore]) -> ChatLogprobs:
    """Scores in the shape of chat completions."""
    return ChatLogprobs(
        [
            ChatLogprob(
                score.text,
                _finite(score.logprob),
                list(score.bytes),
                [TopLogprob(text, _finite(logprob), list(raw)) for _, text, raw, logprob in score.top],
            )
            for score in scores
        ]
    )


def completion_logprobs(scores: list[TokenScore | None], first_text: str, offset: int, want_top: bool) -> CompletionLogprobs:
    """Scores in the shape of plain completions. A None stands for the first prompt token, whose text is `first_text`."""
    tokens: list[str] = []
    logprobs: list[float | None] = []
    top: list[dict[str, float] | None] = []
    offsets: list[int] = []
    for score in scores:
        text = first_text if score is None else score.text
        tokens.append(text)
        offsets.append(offset)
        offset += len(text)
        if score is None:
            logprobs.append(None)
            top.append(None)
        else:
            logprobs.append(_finite(score.logprob))
            # The chosen token is always among them, even when it is not one of the most likely.
            likely = {text: _finite(logprob) for _, text, _, logprob in reversed(score.top)}
            top.append(likely | {score.text: _finite(score.logprob)})
    return CompletionLogprobs(tokens, logprobs, top if want_top else None, offsets)


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes this number for what is as good as impossible."""
    return max(logprob, -9999.0)
