"""`headrace bench`: a load generator for any OpenAI-compatible server.

    options ─▶ dialect ─▶ prompts ─▶ load ─▶ report          wire: the HTTP connection it all goes through
                                      └── compare: two servers in turn

The command line calls `add_arguments` and `run`; scripts call `bench`. It measures what a user would see: real connections, streamed
answers, the server's own token counts. It never shares a process with what it measures.
"""

import argparse
import asyncio
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from headrace.client.bench.compare import compare
from headrace.client.bench.compare import table as comparison_table
from headrace.client.bench.corpus import load_words
from headrace.client.bench.load import measure
from headrace.client.bench.options import Options, add_arguments, from_arguments
from headrace.client.bench.progress import Progress
from headrace.client.bench.report import Report, summarize, table
from headrace.engine.errors import UserError

__all__ = ["Options", "Report", "add_arguments", "bench", "run"]

Result = TypeVar("Result")
_INTERRUPTED = 130
_DEFAULT_ROUNDS = 3


def bench(options: Options, label: str = "") -> Report:
    """One measurement. Raises `UserError` when the server cannot be measured at all; failed requests are in the report."""
    words = load_words(Path(options.dataset) if options.dataset else None)
    return summarize(_loop(measure(options, words, Progress(label))))


def run(arguments: argparse.Namespace) -> int:
    """`headrace bench`: measure, print, save. Exit status 0, 1 when a request failed or nothing could be measured, 130 on Ctrl-C."""
    try:
        options = from_arguments(arguments)
        if arguments.json is not None and not arguments.json.resolve().parent.is_dir():
            raise UserError(f"--json {arguments.json}: there is no folder {arguments.json.resolve().parent}; make it first")
        if arguments.compare:
            other = msgspec.structs.replace(options, url=arguments.compare, model=arguments.compare_model)
            words = load_words(arguments.dataset)
            comparison = _loop(compare(options, other, arguments.rounds or _DEFAULT_ROUNDS, words))
            print(comparison_table(comparison))
            result, clean = comparison, all(not (one.a.errors or one.b.errors) for one in comparison.rounds)
        else:
            result = bench(options)
            print(table(result))
            clean = not result.errors
    except UserError as error:
        print(f"headrace bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nheadrace bench: interrupted, nothing saved", file=sys.stderr)
        return _INTERRUPTED
    if arguments.json is not None:
        arguments.json.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    return 0 if clean else 1


def _loop(work: Coroutine[Any, Any, Result]) -> Result:
    """Run on uvloop where it is installed: it halves the cost of a streamed token."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(work)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)
