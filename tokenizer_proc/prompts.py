"""From what a client asked to what the scheduler can run: the prompt as ids, and parameters that fit the model.

Pure functions over the tokenizer and the chat templates; they may run on a thread of their own for a long prompt.
"""

import math

import msgspec

from headrace.engine.messages.frontend import ChatPrompt, Generate, Prompt, TextPrompt
from headrace.engine.messages.sampling import Sampling
from headrace.engine.messages.wire import LATEST
from headrace.tokenizer_proc.chat import ChatTemplates
from headrace.tokenizer_proc.rejection import Rejection
from headrace.tokenizer_proc.renderer import Renderer
from headrace.tokenizer_proc.vocabulary import Tokenizer

MOST_LOGPROBS = 128
MOST_CONTINUATIONS = 1024
RANGES: dict[str, tuple[float, float]] = {
    "max_tokens": (0, 2**31 - 1),
    "min_tokens": (0, 2**31 - 1),
    "logprobs": (0, MOST_LOGPROBS),
    "prompt_logprobs": (0, MOST_LOGPROBS),
    "top_k": (0, 2**31 - 1),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "temperature": (0, 1e6),
    "repetition_penalty": (1e-6, 1e6),
    "presence_penalty": (-1e6, 1e6),
    "frequency_penalty": (-1e6, 1e6),
}
"""What a worker can compute with. The HTTP endpoint allows less; direct clients come without it."""


def size_of(prompt: Prompt) -> int:
    """About how many characters must be encoded."""
    if isinstance(prompt, TextPrompt):
        return len(prompt.text)
    return len(prompt.messages) + len(prompt.tools) if isinstance(prompt, ChatPrompt) else 0


def param_of(prompt: Prompt) -> str:
    """What clients call it."""
    return "messages" if isinstance(prompt, ChatPrompt) else "prompt"


def encode(
    tokenizer: Tokenizer, templates: ChatTemplates | Renderer, prompt: Prompt, add_special: bool = True
) -> tuple[list[int], str | None]:
    """The prompt's ids, and its text where the client did not send ids. A rendered conversation never gets a second BOS."""
    match prompt:
        case TextPrompt():
            return tokenizer.encode(prompt.text, add_special), prompt.text
        case ChatPrompt():
            text = templates.render(prompt)
            return tokenizer.encode(text, add_special=False), text
    tokenizer.check(prompt.ids, "prompt")
    return list(prompt.ids), None


def fit(tokenizer: Tokenizer, generate: Generate, prompt_tokens: int) -> Sampling:
    """The sampling parameters with `max_tokens` resolved. Rejection when prompt and parameters do not fit the model."""
    context, sampling, param = tokenizer.context, generate.sampling, param_of(generate.prompt)
    count = len(generate.requests)
    if len(generate.seeds) != count or len(set(generate.requests)) != count or len(generate.emitted) not in (0, count):
        raise Rejection(f"{count} requests need as many different ids and seeds, and emitted tokens for all or none", "n")
    if count > MOST_CONTINUATIONS:
        raise Rejection(f"{count} continuations of one prompt are too many: ask for at most {MOST_CONTINUATIONS} at once", "n")
    _check_numbers(generate)
    if prompt_tokens == 0:
        raise Rejection("the prompt has no tokens: give at least one", param)
    if prompt_tokens >= context:
        raise Rejection(
            f"prompt of {prompt_tokens} tokens exceeds the context of {context}: shorten it to at most {context - 1}",
            param,
            "context_length_exceeded",
        )
    room = context - prompt_tokens
    if sampling.max_tokens is None:
        sampling = msgspec.structs.replace(sampling, max_tokens=room)
    elif sampling.max_tokens > room:
        raise Rejection(
            f"max_tokens={sampling.max_tokens} exceeds the context of {context} (prompt {prompt_tokens}): ask for at most {room}",
            "max_tokens",
            "context_length_exceeded",
        )
    tokenizer.check(sampling.stop_token_ids, "stop_token_ids")
    tokenizer.check([token for token, _ in sampling.logit_bias], "logit_bias")
    for emitted in generate.emitted:
        tokenizer.check(emitted, "emitted")
    if "" in generate.stop:
        raise Rejection("stop has an empty string, which is everywhere: leave it out", "stop")
    return sampling


def _check_numbers(generate: Generate) -> None:
    """Rejection of the first parameter that is out of its range, or no number at all."""
    for name, (low, high) in RANGES.items():
        value = getattr(generate.sampling, name)
        if value is not None and not low <= value <= high:
            raise Rejection(f"{name}={value:g} is out of range: it must be from {low:g} to {high:g}", name, "out_of_range")
    if not all(math.isfinite(bias) for _, bias in generate.sampling.logit_bias):
        raise Rejection("logit_bias has a bias that is not finite: give numbers", "logit_bias", "out_of_range")
    if not all(0 <= number < 1 << 64 for number in (*generate.requests, *generate.seeds)):
        raise Rejection("a request id or seed is out of range: both are unsigned numbers of 64 bits", "seed", "out_of_range")
    if generate.deadline is not None and not 0 <= generate.deadline <= LATEST:
        raise Rejection(f"deadline={generate.deadline:g} is no time of the monotonic clock: give seconds", "deadline", "out_of_range")
    if not -(1 << 31) <= generate.priority < 1 << 31:
        raise Rejection(f"priority={generate.priority} is out of range: it must have 32 bits", "priority", "out_of_range")
