"""Prompts of a wanted length, cut from real text, none of which begins like another.

Each opens with two random words (or token ids), so that a server's prefix cache is never hit by accident, and goes on with prose from
a random place. A shared prefix, where one is wanted, stands before that. How exact the length is depends on the server:

    token ids      it tokenizes and takes ids: exact, and cut on the fly
    exact text     it tokenizes: texts are fitted to the length before the clock starts
    rough text     neither: words are counted, at the rate that one request's usage showed
"""

import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

from headrace.client.bench.dialect import Dialect, Prompt, count_tokens, prompt_tokens_of, tokenize
from headrace.client.bench.options import Options
from headrace.client.calls import Server
from headrace.engine.errors import UserError

MAX_PREPARED = 512
"""Texts that are fitted beforehand when a duration, not a number of requests, is wanted."""
MAX_POOL_TOKENS = 60_000
_PIECE_WORDS = 400
_FILLER = " a"
"""A word that common tokenizers take as one token, to reach a length exactly."""
_GUESS_TOKENS_A_WORD = 1.35

Item = TypeVar("Item")
Count = Callable[[str], Awaitable[int]]


class TokenPrompts:
    """Lists of token ids, exact by construction."""

    how = "token ids, exact"
    repeated = False

    def __init__(self, pool: list[int], options: Options, rng: random.Random) -> None:
        self._pool = pool
        self._vocabulary = sorted(set(pool))
        self._range = options.prompt_tokens
        self._rng = rng
        self.prefix = self._cut(options.shared_prefix) if options.shared_prefix else []

    def next(self) -> Prompt:
        """The next prompt, the shared prefix included."""
        return self.prefix + self._cut(self._rng.randint(*self._range))

    def apart(self) -> Prompt:
        """A prompt without the shared prefix, as long as one with it: for warming up."""
        return self._cut(len(self.prefix) + self._range[1])

    def _cut(self, length: int) -> list[int]:
        lead = [self._rng.choice(self._vocabulary) for _ in range(min(2, length))]
        return lead + _slice(self._pool, self._rng, length - len(lead))


class TextPrompts:
    """Texts, fitted to the length or estimated."""

    repeated = False

    def __init__(self, words: list[str], options: Options, rng: random.Random, tokens_a_word: float) -> None:
        self.how = "text, approximate"
        self._words = words
        self._range = options.prompt_tokens
        self._rng = rng
        self._tokens_a_word = tokens_a_word
        self._prefix_tokens = options.shared_prefix
        self.prefix = self._passage(options.shared_prefix) + " " if options.shared_prefix else ""
        self._fitted: list[str] = []
        self._taken = 0

    async def fit(self, number: int, count: Count) -> None:
        """Prepare `number` texts whose length the server's own count confirms. Raises `UserError` when the length cannot be had."""
        if self._prefix_tokens:
            self.prefix = await self._fit_one("", self._prefix_tokens, count) + " "
        exact = True
        for _ in range(number):
            wanted = self._prefix_tokens + self._rng.randint(*self._range)
            text = await self._fit_one(self.prefix, wanted, count)
            exact = exact and await count(text) == wanted
            self._fitted.append(text)
        self.how = "text, exact" if exact else "text, within a few tokens"

    def next(self) -> Prompt:
        if not self._fitted:
            return self.prefix + self._passage(self._rng.randint(*self._range))
        self.repeated = self._taken >= len(self._fitted)
        text = self._fitted[self._taken % len(self._fitted)]
        self._taken += 1
        return text

    def apart(self) -> Prompt:
        return self._passage(self._prefix_tokens + self._range[1])

    def _passage(self, tokens: int) -> str:
        return self._cut(max(2, round(tokens / self._tokens_a_word)))

    def _cut(self, words: int) -> str:
        lead = [self._rng.choice(self._words) for _ in range(2)]
        return " ".join(lead + _slice(self._words, self._rng, words - 2))

    async def _fit_one(self, prefix: str, wanted: int, count: Count) -> str:
        """Bisect on the number of words, then fill up with one-token words."""
        passage = self._cut(wanted + 2).split(" ")
        low, high = 2, len(passage)
        if (least := await count(prefix + " ".join(passage[:low]))) > wanted:
            raise UserError(f"prompts of {wanted} tokens cannot be had: the shortest here has {least}; ask for longer --prompt-tokens")
        below = least
        guess = round((wanted - least) / self._tokens_a_word) + low
        while high - low > 1:
            middle = min(max(guess, low + 1), high - 1)
            found = await count(prefix + " ".join(passage[:middle]))
            if found <= wanted:
                low, below = middle, found
            else:
                high = middle
            if found == wanted:
                break
            guess = middle + round((wanted - found) / self._tokens_a_word)
        return prefix + " ".join(passage[:low]) + _FILLER * (wanted - below)


def _slice(pool: list[Item], rng: random.Random, length: int) -> list[Item]:
    """`length` items from a random place on, round the end if need be."""
    start = rng.randrange(len(pool))
    taken = pool[start : start + length]
    while len(taken) < length:
        taken += pool[: length - len(taken)]
    return taken


async def prepare(server: Server, dialect: Dialect, options: Options, words: list[str]) -> TokenPrompts | TextPrompts:
    """The best prompts that this server allows. Raises `UserError`."""
    rng = random.Random(options.seed)
    longest = options.prompt_tokens[1] + options.shared_prefix
    if dialect.token_ids:
        wanted = min(MAX_POOL_TOKENS, longest * max(4, options.requests or MAX_PREPARED))
        start = rng.randrange(len(words))
        ids: list[int] = []
        while len(ids) < wanted:
            piece = [words[(start + i) % len(words)] for i in range(_PIECE_WORDS)]
            ids += await tokenize(server, dialect, " " + " ".join(piece), special=False)
            start += _PIECE_WORDS
        return TokenPrompts(ids, options, rng)
    ratio = _GUESS_TOKENS_A_WORD
    if not dialect.tokenizer:
        text = " ".join(_slice(words, rng, 200))
        ratio = (await prompt_tokens_of(server, dialect, text) or ratio * 200) / 200
    prompts = TextPrompts(words, options, rng, ratio)
    if dialect.tokenizer:
        await prompts.fit(options.requests or MAX_PREPARED, lambda text: count_tokens(server, dialect, text))
    return prompts
