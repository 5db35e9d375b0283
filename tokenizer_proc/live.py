"""One request between its submission and its last word: what the tokenizer must know to turn its tokens into text.

token ─▶ TextStream ─▶ StopFinder ─▶ text of the next `Text`
                           └─ match: closed, later tokens are dropped
"""

from headrace.engine.curve import Guest
from headrace.engine.messages.frontend import End, Generate, PromptScores, Scores, Text, TokenScore
from headrace.engine.messages.sampling import Sampling
from headrace.engine.messages.tokens import PromptLogprobs, Submit, TokenEnd, TokenLogprobs
from headrace.tokenizer_proc.spelling import Spelling
from headrace.tokenizer_proc.stops import StopFinder
from headrace.tokenizer_proc.vocabulary import Tokenizer

Frontend = bytes | Guest
"""Who asked: the identity of one on this machine, or a client on another."""


class Live:
    """The state of one request. `fresh` and `text` are what the next `Text` message takes."""

    __slots__ = (
        "aborted",
        "closed",
        "counted",
        "end",
        "expected",
        "fresh",
        "frontend",
        "generate",
        "min_tokens",
        "place",
        "prompt_scores",
        "request",
        "scored",
        "scores",
        "stops",
        "stream",
        "submit",
        "text",
        "tokens",
        "touched",
    )

    def __init__(
        self, frontend: Frontend, generate: Generate, place: int, prompt: list[int], sampling: Sampling, tokenizer: Tokenizer, reply_to: str
    ) -> None:
        """The request `generate.requests[place]`."""
        self.frontend = frontend
        self.generate = generate
        self.place = place
        self.request = generate.requests[place]
        self.tokens: list[int] = list(generate.emitted[place]) if place < len(generate.emitted) else []
        """Every token emitted so far. The scheduler's submission shares this list, so it can be sent again as it stands."""
        self.submit = Submit(
            request=self.request,
            reply_to=reply_to,
            prompt=prompt,
            sampling=sampling,
            seed=generate.seeds[place],
            emitted=self.tokens,
            tenant=generate.tenant,
            priority=generate.priority,
            deadline=generate.deadline,
            answer=generate.answer,
            trace=generate.trace,
            attempt=generate.attempt,
        )
        self.expected = len(self.tokens)
        """Tokens that are known to exist. More than `tokens` has, while some are still to be told again."""
        self.stream = tokenizer.stream(generate.skip_special_tokens, prompt)
        self.stops = StopFinder(generate.stop, generate.include_stop) if generate.stop else None
        self.min_tokens = sampling.min_tokens
        self.closed = self.aborted = False
        """`closed`: a stop string was found or the frontend gave up; what still comes is dropped."""
        self.counted: int | None = None
        """Tokens that count, once it is closed."""
        self.touched = False
        self.fresh = 0
        self.text = ""
        self.scores: list[TokenScore] = []
        self.scored = len(self.tokens)
        """Tokens whose scores were taken."""
        self.prompt_scores = PromptTally(len(prompt)) if sampling.prompt_logprobs is not None else None
        self.end: End | None = None
        for count, token in enumerate(self.tokens, 1):
            if not self.closed:
                self.read(token, count)
        self.text = ""

    @property
    def emitted(self) -> int:
        """Tokens that count as this request's completion."""
        return len(self.tokens) if self.counted is None else self.counted

    def read(self, token: int, count: int) -> None:
        """Turn the `count`-th token into text. As long as `min_tokens` are not exceeded no stop string is looked for."""
        text = self.stream.add(token)
        if self.stops is not None and count > self.min_tokens:
            text = self.stops.feed(text)
            if self.stops.matched is not None:
                self.closed = True
                self.counted = count
        self.text += text

    def finish(self, end: TokenEnd) -> None:
        """The scheduler is done with it: keep the last word, and give up what stops held back."""
        reason, stop = end.reason, end.stop_token
        if self.stops is not None:
            if self.stops.matched is not None:
                reason, stop = "stop", self.stops.matched
            elif not self.aborted:
                self.text += self.stops.rest()
        self.end = End(self.request, reason, stop, len(self.submit.prompt), self.emitted, end.cached_tokens, end.queue_s, end.preemptions)

    def finish_alone(self) -> None:
        """It is closed, and no scheduler knows it any more."""
        self.finish(TokenEnd(self.request, "abort", None, 0, 0.0, 0))

    def score(self, found: TokenLogprobs, spelling: Spelling) -> bool:
        """Take the scores of the next emitted token; False when they are known, too early or no longer wanted.

        Too early are those that came with a token beyond a gap; they come again, in their order.
        """
        if self.aborted or found.index != self.scored or found.index >= self.emitted:
            return False
        self.scores.append(token_score(self.tokens[found.index], found.logprob, found.top_ids, found.top_logprobs, spelling))
        self.scored = found.index + 1
        return True


class PromptTally:
    """Collects the scores of a prompt's tokens, which come in chunks and, after a restart, twice."""

    __slots__ = ("_missing", "_scores")

    def __init__(self, prompt_tokens: int) -> None:
        self._scores: list[TokenScore | None] = [None] * prompt_tokens
        self._missing = prompt_tokens - 1

    def complete(self) -> bool:
        return self._missing == 0

    def message(self, request: int) -> PromptScores:
        return PromptScores(request, tuple(self._scores))

    def add(self, found: PromptLogprobs, prompt: list[int], spelling: Spelling) -> None:
        """Take one chunk; places that are known are kept."""
        for offset, logprob in enumerate(found.logprobs):
            place = found.first + offset
            if 0 < place < len(prompt) and self._scores[place] is None:
                top_ids = found.top_ids[offset] if found.top_ids else ()
                top_logprobs = found.top_logprobs[offset] if found.top_logprobs else ()
                self._scores[place] = token_score(prompt[place], logprob, top_ids, top_logprobs, spelling)
                self._missing -= 1


def token_score(token: int, logprob: float, top_ids: tuple[int, ...], top_logprobs: tuple[float, ...], spelling: Spelling) -> TokenScore:
    """A score with the token's text and bytes, and those of the most likely tokens."""
    top = tuple(
        (other, spelling.text_of(other), spelling.bytes_of(other), value) for other, value in zip(top_ids, top_logprobs, strict=True)
    )
    return TokenScore(token, spelling.text_of(token), spelling.bytes_of(token), logprob, top)


def collect(live: Live, text: Text) -> None:
    """Move what is new of a request into its frontend's message."""
    if live.fresh or live.text:
        text.requests.append(live.request)
        text.texts.append(live.text)
        text.counts.append(live.fresh)
        if live.fresh:
            end = live.emitted
            text.tokens.extend(live.tokens[end - live.fresh : end])
    if live.scores:
        text.scores.append(Scores(live.request, tuple(live.scores)))
        live.scores = []
    if live.end is not None:
        text.ends.append(live.end)
    live.fresh = 0
    live.text = ""
    live.touched = False
