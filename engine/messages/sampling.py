"""How the next token of a request is chosen: the parameters that travel from the endpoint to the kernel unchanged.

Defaults mean "off". The endpoint validates (ranges, finiteness); everything behind it trusts the values.
"""

from headrace.engine.messages.wire import Message


class Sampling(Message):
    """Sampling parameters of one request, in the order in which they act on the logits."""

    max_tokens: int | None = None
    """Most tokens to emit; None until the tokenizer resolves it to what is left of the context."""
    min_tokens: int = 0
    """End and stop tokens cannot be chosen before this many tokens were emitted."""
    ignore_eos: bool = False
    """The model's end tokens do not end the request (they may still be emitted)."""
    stop_token_ids: tuple[int, ...] = ()
    """Further tokens that end the request; the token itself is not turned into text."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, bias) added to the logits, after the penalties."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens seen in prompt or output (CTRL, arXiv:1909.05858 §4.1)."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of every token already emitted."""
    frequency_penalty: float = 0.0
    """Subtracted from the logit of every emitted token, times how often it was emitted."""
    temperature: float = 1.0
    """0 means greedy: the lowest id among the largest logits."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probability reaches p (arXiv:1904.09751)."""
    min_p: float = 0.0
    """Keep tokens at least min_p times as likely as the most likely one (arXiv:2407.01082)."""
    logprobs: int | None = None
    """Report the log-probability of each emitted token and of this many most likely ones; None reports nothing."""
    prompt_logprobs: int | None = None
    """The same for every prompt token but the first."""
