"""What one measurement is: the command line's options, the four standard workloads, and the checks between them.

    a  one stream: 32 tokens in, 128 out          c  throughput: 32 concurrent, 120-136 in, 64 out
    b  prefill: 1,024 tokens in, 1 out            d  shared prefix: 32 concurrent, 768 common + 32 own in, 32 out

A workload fills in what the command line leaves open, so `--work c --requests 64` is workload c, twice as long.
"""

import argparse
import random
from pathlib import Path

import msgspec

from headrace.client.calls import DEFAULT_URL
from headrace.engine.errors import UserError


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement. Lengths are in tokens, times in seconds."""

    url: str = DEFAULT_URL
    model: str | None = None
    api_key: str | None = None
    endpoint: str = "completions"
    work: str | None = None
    concurrency: int | None = 1
    request_rate: float | None = None
    """Mean arrivals a second (Poisson); None keeps `concurrency` requests in flight instead."""
    requests: int | None = 8
    duration: float | None = None
    """Seconds in which requests are started; None starts `requests` of them."""
    prompt_tokens: tuple[int, int] = (128, 128)
    """Least and most tokens of a prompt, the shared prefix not counted."""
    output_tokens: int = 128
    shared_prefix: int = 0
    warm: bool = False
    """Send the shared prefix once before the clock starts."""
    ignore_eos: bool = True
    temperature: float = 0.0
    warmup: int = 1
    """Requests before the clock starts, with prompts of their own."""
    seed: int = 0
    timeout: float = 600.0
    dataset: str | None = None


WORKLOADS: dict[str, dict[str, object]] = {
    "a": {"concurrency": 1, "requests": 5, "prompt_tokens": (32, 32), "output_tokens": 128},
    "b": {"concurrency": 1, "requests": 5, "prompt_tokens": (1024, 1024), "output_tokens": 1},
    "c": {"concurrency": 32, "requests": 32, "prompt_tokens": (120, 136), "output_tokens": 64},
    "d": {"concurrency": 32, "requests": 32, "prompt_tokens": (32, 32), "output_tokens": 32, "shared_prefix": 768},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `headrace bench`."""
    add = parser.add_argument
    add("--url", default=DEFAULT_URL, help="any OpenAI-compatible server (default: %(default)s)")
    add("--model", help="model name to ask for (default: the first that the server lists)")
    add("--api-key", help="sent as a bearer token")
    add("--work", choices=sorted(WORKLOADS), help="a: one stream, b: prefill, c: throughput, d: shared prefix")
    add("--endpoint", choices=("completions", "chat"), default="completions")
    pace = parser.add_mutually_exclusive_group()
    pace.add_argument("--concurrency", type=_positive_int, metavar="N", help="keep N requests in flight (default: 1)")
    pace.add_argument("--request-rate", type=_positive_float, metavar="R", help="start R requests a second on average, Poisson")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--requests", type=_positive_int, metavar="N", help="how many (default: 8, or 4 for each in flight)")
    size.add_argument("--duration", type=_positive_float, metavar="SECONDS", help="start requests for this long")
    add("--prompt-tokens", type=_range, metavar="A[-B]", help="prompt length, without the shared prefix (default: 128)")
    add("--output-tokens", type=_positive_int, metavar="N", help="tokens to generate (default: 128)")
    add("--shared-prefix", type=_positive_int, metavar="TOKENS", help="a prefix that all prompts have in common")
    add("--warm", action="store_true", help="send the shared prefix once before the clock starts")
    add("--dataset", type=Path, metavar="FILE", help="text to cut prompts from (default: Python's help topics)")
    add(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on past the model's end token, where the server knows the extension (default: yes)",
    )
    add("--temperature", type=_temperature, default=0.0, metavar="T", help="default: 0")
    add("--warmup", type=_natural, default=1, metavar="N", help="requests before the clock starts (default: 1)")
    add("--seed", type=_natural, metavar="N", help="chooses prompts and arrivals (default: random, and reported)")
    add("--timeout", type=_positive_float, default=600.0, metavar="SECONDS", help="for one request (default: 600)")
    add("--json", type=Path, metavar="FILE", help="save the whole report")
    add("--compare", metavar="URL2", help="measure this server too, in turn with the first, and print ratios")
    add("--compare-model", metavar="NAME", help="model name for the second server (default: the first that it lists)")
    add("--rounds", type=_positive_int, metavar="N", help="with --compare: rounds of A and B (default: 3)")


def from_arguments(arguments: argparse.Namespace) -> Options:
    """The measurement that the command line describes. Raises `UserError`."""
    chosen: dict[str, object] = dict(WORKLOADS[arguments.work]) if arguments.work else {}
    for name in ("concurrency", "request_rate", "requests", "duration", "prompt_tokens", "output_tokens", "shared_prefix"):
        if (value := getattr(arguments, name)) is not None:
            chosen[name] = value
    if arguments.request_rate is not None:
        chosen["concurrency"] = None
    elif "concurrency" not in chosen:
        chosen["concurrency"] = 1
    if arguments.duration is not None:
        chosen["requests"] = None
    elif "requests" not in chosen:
        chosen["requests"] = max(8, 4 * (chosen["concurrency"] or 1))  # type: ignore[operator]
    options = Options(
        url=arguments.url,
        model=arguments.model,
        api_key=arguments.api_key,
        work=arguments.work,
        endpoint=arguments.endpoint,
        warm=arguments.warm,
        ignore_eos=arguments.ignore_eos,
        temperature=arguments.temperature,
        warmup=arguments.warmup,
        seed=random.SystemRandom().randrange(1 << 31) if arguments.seed is None else arguments.seed,
        timeout=arguments.timeout,
        dataset=None if arguments.dataset is None else str(arguments.dataset),
        **chosen,  # type: ignore[arg-type]
    )
    if options.warm and not options.shared_prefix:
        raise UserError("--warm has no effect without a shared prefix: add --shared-prefix TOKENS")
    if arguments.compare is None and (arguments.rounds is not None or arguments.compare_model is not None):
        raise UserError("--rounds and --compare-model have no effect alone: add --compare URL2")
    if options.prompt_tokens[0] < 4:
        raise UserError(f"--prompt-tokens {options.prompt_tokens[0]} is too short for a prompt of its own: ask for at least 4")
    return options


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def _natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def _positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _temperature(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 2:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 2")
    return value


def _range(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    try:
        least = int(low)
        most = int(high) if high else least
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor a range such as 120-136") from None
    if not 0 < least <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is no range of positive numbers, such as 120-136")
    return least, most
