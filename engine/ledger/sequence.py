"""One request as the ledger sees it: its tokens, how far they are computed, and the pages they lie in."""

from headrace.engine.ledger.radix import Node
from headrace.engine.messages.sampling import Sampling


class Sequence:
    """Tokens that are known, of which the first `computed` have keys and values in pages.

    tokens   ■■■■■■■■■■■■■■■■■■■■■□□□      known: prompt, then emitted
    computed ■■■■■■■■■■■■■■■■■■■■■
    pages    [ node ][ node ][ own  ]      full pages lie in the radix tree, the last ones are the request's own
    """

    __slots__ = (
        "_chain",
        "arrived",
        "cached",
        "computed",
        "end_tokens",
        "last_run",
        "limit",
        "lookahead",
        "max_tokens",
        "nodes",
        "pages",
        "priority",
        "prompt",
        "request",
        "sampling",
        "seed",
        "suspect",
        "tenant",
        "tokens",
    )

    def __init__(
        self, request: int, prompt: list[int], emitted: list[int], sampling: Sampling, seed: int, end_tokens: frozenset[int]
    ) -> None:
        self.request = request
        self.prompt = len(prompt)
        """Tokens of the prompt; those after it were emitted."""
        self.tokens = prompt + emitted
        self.sampling = sampling
        self.seed = seed
        self.max_tokens = sampling.max_tokens or 0
        self.limit = self.prompt + self.max_tokens
        """Tokens that it may have, prompt and output together."""
        self.end_tokens = end_tokens
        """Tokens that end it: stop tokens, and the model's own unless they are to be ignored."""
        self.computed = 0
        self.cached = 0
        """Tokens that the prefix cache gave when it last started from nothing."""
        self.last_run = -1
        """Step that last computed some of it, as far as a plan named it: those that are sent ahead name nobody, and run all that ran."""

        # What the scheduler plans by; no ledger reads it.
        self.priority = 0
        self.tenant = ""
        self.arrived = 0.0
        """Monotonic seconds."""
        self.lookahead = 0
        """How many drafts a step should verify behind its next token."""
        self.suspect = False
        """Workers may have died of it: it runs alone."""

        self._chain: list[int] = []
        self.nodes: list[Node] = []
        self.pages: list[int] = []
        """Page numbers in order: those of `nodes`, then the request's own."""

    @property
    def emitted(self) -> int:
        return len(self.tokens) - self.prompt

    @property
    def remaining(self) -> int:
        """Known tokens that are still to be computed."""
        return len(self.tokens) - self.computed

    @property
    def may_match(self) -> int:
        """Most tokens that it may take from the prefix cache: the last token must be computed, and scored prompts wholly."""
        return 0 if self.sampling.prompt_logprobs is not None else len(self.tokens) - 1

    def chain(self, page_size: int) -> list[int]:
        """For each full page of known tokens, a hash of everything up to its end: equal hashes mean equal prefixes."""
        chain = self._chain
        for start in range(len(chain) * page_size, len(self.tokens) - page_size + 1, page_size):
            chain.append(hash((chain[-1] if chain else 0, *self.tokens[start : start + page_size])))
        return chain

    def ends_with(self, token: int) -> str | None:
        """Why the request is over now that `token` is its last, or None."""
        if token in self.end_tokens and self.emitted >= self.sampling.min_tokens:
            return "stop"
        return "length" if len(self.tokens) >= self.limit else None
