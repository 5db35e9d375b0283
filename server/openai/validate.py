"""What a body asks for, checked: from OpenAI's parameters to `Sampling` and prompts. Every refusal names parameter, value and range."""

import math
import secrets
from typing import Any

from headrace.engine.messages.frontend import ChatPrompt, Prompt, TextPrompt, TokenPrompt
from headrace.engine.messages.openai.requests import Chat, Completion, Generation
from headrace.engine.messages.sampling import Sampling
from headrace.server.openai.errors import Refusal

MOST_CHOICES = 128
MOST_PROMPTS = 1024
MOST_STOPS = 4
MOST_LOGPROBS = 20
MOST_BIASES = 1024
DEFAULT_COMPLETION_TOKENS = 16
"""What OpenAI's /v1/completions generates when `max_tokens` is not given."""


def number(name: str, value: float | None, default: float, low: float, high: float, low_open: bool = False) -> float:
    """`value`, or `default` when it is not given. Raises `Refusal` outside low … high, and for what is no number."""
    if value is None:
        return default
    if not math.isfinite(value) or not low <= value <= high or (low_open and value == low):
        allowed = f"above {low:g} and at most {high:g}" if low_open else f"from {low:g} to {high:g}"
        raise Refusal(f"{name}={value:g} is out of range: it must be {allowed}", name, code="out_of_range")
    return value


def whole(name: str, value: int | None, default: int, low: int, high: int = 2**31 - 1) -> int:
    """The same for whole numbers."""
    if value is None:
        return default
    if not low <= value <= high:
        shown = value if abs(value) < 10**20 else f"{str(value)[:20]}…"
        allowed = f"at least {low}" if value < low and high == 2**31 - 1 else f"from {low} to {high}"
        raise Refusal(f"{name}={shown} is out of range: it must be {allowed}", name, code="out_of_range")
    return value


def choices(body: Generation) -> int:
    """How many continuations of each prompt are wanted."""
    count = whole("n", body.n, 1, 1, MOST_CHOICES)
    whole("priority", body.priority, 0, -(2**31))
    if body.stream_options is not None and not body.stream:
        raise Refusal("stream_options needs stream=true", "stream_options")
    return count


def seeds(body: Generation, count: int) -> tuple[int, ...]:
    """A 64-bit seed for each of `count` continuations: consecutive ones from the client's, or random ones."""
    if body.seed is None:
        return tuple(secrets.randbits(64) for _ in range(count))
    seed = whole("seed", body.seed, 0, -(2**63), 2**64 - 1)
    return tuple((seed + place) & 0xFFFFFFFFFFFFFFFF for place in range(count))


def timeout(body: Generation, default: float | None) -> float | None:
    """Seconds in which the answer must be done; None for no limit."""
    return default if body.timeout is None else number("timeout", body.timeout, 0.0, 0.0, 1e6, low_open=True)


def stops(body: Generation) -> tuple[str, ...]:
    """The stop strings."""
    found = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    if len(found) > MOST_STOPS:
        raise Refusal(f"stop has {len(found)} strings: give at most {MOST_STOPS}", "stop", code="out_of_range")
    if "" in found:
        raise Refusal("stop holds an empty string, which would end every answer at once: leave it out", "stop")
    return found


def sampling(body: Generation, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None = None) -> Sampling:
    """The sampling parameters of `body`; `max_tokens` and the logprobs are named differently by the two endpoints."""
    min_tokens = whole("min_tokens", body.min_tokens, 0, 0)
    if max_tokens is not None and min_tokens > max_tokens:
        raise Refusal(f"min_tokens={min_tokens} exceeds max_tokens={max_tokens}", "min_tokens")
    stop_ids = tuple(body.stop_token_ids or ())
    for token in stop_ids:
        whole("stop_token_ids", token, 0, 0)
    top_k = whole("top_k", body.top_k, 0, -1)
    return Sampling(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        ignore_eos=body.ignore_eos,
        stop_token_ids=stop_ids,
        logit_bias=logit_bias(body.logit_bias),
        repetition_penalty=number("repetition_penalty", body.repetition_penalty, 1.0, 0.0, 10.0, low_open=True),
        presence_penalty=number("presence_penalty", body.presence_penalty, 0.0, -2.0, 2.0),
        frequency_penalty=number("frequency_penalty", body.frequency_penalty, 0.0, -2.0, 2.0),
        temperature=number("temperature", body.temperature, 1.0, 0.0, 2.0),
        top_k=max(top_k, 0),
        top_p=number("top_p", body.top_p, 1.0, 0.0, 1.0, low_open=True),
        min_p=number("min_p", body.min_p, 0.0, 0.0, 1.0),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def logit_bias(biases: dict[str, float] | None) -> tuple[tuple[int, float], ...]:
    """Token ids come as JSON keys, so as strings."""
    if not biases:
        return ()
    if len(biases) > MOST_BIASES:
        raise Refusal(f"logit_bias has {len(biases)} entries: give at most {MOST_BIASES}", "logit_bias", code="out_of_range")
    pairs = []
    for key, bias in biases.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise Refusal(f"logit_bias has the key {key[:40]!r}: keys must be token ids", "logit_bias")
        pairs.append((int(key), number("logit_bias", bias, 0.0, -100.0, 100.0)))
    return tuple(pairs)


def completion_prompts(body: Completion) -> list[Prompt]:
    """The prompts: one string or id list, or a list of either."""
    prompt = body.prompt
    if prompt is None:
        raise Refusal("prompt is missing", "prompt", code="missing_required_parameter")
    if isinstance(prompt, str):
        return [TextPrompt(prompt)]
    if not prompt:
        raise Refusal("prompt is an empty list: give a string, token ids, or a list of either", "prompt")
    if all(isinstance(one, str) for one in prompt):
        found: list[Prompt] = [TextPrompt(one) for one in prompt]
    elif all(_is_id(one) for one in prompt):
        found = [TokenPrompt(tuple(prompt))]
    elif all(isinstance(one, list) and one and all(_is_id(token) for token in one) for one in prompt):
        found = [TokenPrompt(tuple(one)) for one in prompt]
    else:
        raise Refusal(
            "prompt must be a string, a list of strings, a list of token ids, or a list of non-empty lists of token ids", "prompt"
        )
    if len(found) > MOST_PROMPTS:
        raise Refusal(f"prompt has {len(found)} entries: give at most {MOST_PROMPTS} in one request", "prompt", code="out_of_range")
    return found


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def completion_sampling(body: Completion) -> Sampling:
    """Sampling of a plain completion; with `echo`, the prompt is scored too when logprobs are asked for."""
    if body.suffix is not None:
        raise Refusal("suffix is not supported: leave it out", "suffix", code="unsupported_parameter")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise Refusal(f"best_of={body.best_of} is not supported unless it equals n", "best_of", code="unsupported_parameter")
    logprobs = None if body.logprobs is None else whole("logprobs", body.logprobs, 0, 0, MOST_LOGPROBS)
    max_tokens = whole("max_tokens", body.max_tokens, DEFAULT_COMPLETION_TOKENS, 0)
    if max_tokens == 0 and not body.echo:
        raise Refusal("max_tokens=0 generates nothing: ask for at least 1, or for echo=true", "max_tokens", code="out_of_range")
    return sampling(body, max_tokens, logprobs, logprobs if body.echo else None)


def chat_prompt(body: Chat, encode) -> Prompt:
    """The conversation, for the tokenizer to render. `encode` makes JSON of it."""
    if not body.messages:
        raise Refusal("messages is empty: give at least one message", "messages")
    for place, message in enumerate(body.messages):
        if not isinstance(message.get("role"), str):
            raise Refusal(f"messages[{place}] has no role: give one such as 'user'", "messages")
        content = message.get("content")
        if isinstance(content, list):
            for part in content:
                if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                    kind = part.get("type") if isinstance(part, dict) else part
                    raise Refusal(f"messages[{place}].content has a part of type {kind!r}: only text is supported", "messages")
        elif not isinstance(content, str):
            raise Refusal(f"messages[{place}].content must be a string or a list of text parts", "messages")
    if body.continue_final_message and body.add_generation_prompt:
        raise Refusal("continue_final_message needs add_generation_prompt=false", "continue_final_message")
    return ChatPrompt(
        encode(body.messages), body.add_generation_prompt, body.continue_final_message, encode(body.chat_template_kwargs or {})
    )


def chat_sampling(body: Chat) -> Sampling:
    """Sampling of a chat completion."""
    for name, value, neutral in (
        ("tools", body.tools, ([],)),
        ("functions", body.functions, ([],)),
        ("tool_choice", body.tool_choice, ("none", "auto")),
        ("modalities", body.modalities, (["text"],)),
        ("response_format", body.response_format and body.response_format.type, ("text",)),
    ):
        if value is not None and value not in neutral:
            raise Refusal(f"{name} is not supported yet: leave it out", name, code="unsupported_parameter")
    if body.store:
        raise Refusal("store=true is not supported: answers are not kept", "store", code="unsupported_parameter")
    if body.max_tokens is not None and body.max_completion_tokens is not None and body.max_tokens != body.max_completion_tokens:
        raise Refusal("max_tokens and max_completion_tokens differ: give one of them", "max_tokens")
    limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    name = "max_completion_tokens" if body.max_completion_tokens is not None else "max_tokens"
    max_tokens = None if limit is None else whole(name, limit, 0, 1)
    if body.top_logprobs is not None and not body.logprobs:
        raise Refusal("top_logprobs needs logprobs=true", "top_logprobs")
    logprobs = whole("top_logprobs", body.top_logprobs, 0, 0, MOST_LOGPROBS) if body.logprobs else None
    return sampling(body, max_tokens, logprobs)
