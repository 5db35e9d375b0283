"""The command line: `headrace serve | chat | bench | keys | doctor`.

Each command imports what it runs only when it is chosen, so that `--version` and `--help` answer at once. What a user can mend is
one line on stderr and exit status 1; a wrong command line is one line and exit status 2.
"""

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from headrace.engine.errors import UserError

USAGE = 2
INTERRUPTED = 130

DESCRIPTION = """\
Headrace serves language models over the OpenAI API, on a plain CPU too.

  headrace serve            serve the embedded default model on http://127.0.0.1:8000
  headrace serve MODEL      serve a GGUF file, a model directory or a hub name such as Qwen/Qwen3-0.6B
  headrace chat             talk to a running server from the terminal
  headrace bench            load any OpenAI-compatible server and report its latencies and throughput
  headrace bench kernels    time every op at a model's shapes, beside what this machine can do at most
  headrace keys DIR NAME    make the keys with which NAME may connect from another machine, without HTTP
  headrace doctor           what this machine has, which kernels run here, and what would be slow

`headrace COMMAND --help` shows the options of a command."""

SERVE = """\
Serve a model over the OpenAI API until Ctrl-C. SIGTERM lets running requests finish first.

Every option may also be an environment variable (--max-context: HEADRACE_MAX_CONTEXT) or a key of a TOML file
(max_context = 4096) that --config or HEADRACE_CONFIG names. A flag wins over the environment, the environment over the file."""


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with a command line."""

    def __init__(self, **options: object) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        known, unknown = self.parse_known_args(arguments)
        if unknown:
            flag = unknown[0].partition("=")[0]
            close = difflib.get_close_matches(flag, self._option_string_actions, 1)
            self.error(f"{flag} is no option" + (f": did you mean {close[0]}?" if close else ""))
        return known


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = Parser(prog="headrace", usage="headrace COMMAND [OPTIONS]", description=DESCRIPTION)
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    chosen = parser.parse(arguments[:1])
    if chosen.version:
        from importlib.metadata import version

        print(f"headrace {version('headrace')}")
        return 0
    if chosen.command is None:
        parser.print_help()
        return 0
    if chosen.command not in COMMANDS:
        close = difflib.get_close_matches(chosen.command, COMMANDS, 1)
        hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(COMMANDS)}"
        parser.error(f"{chosen.command!r} is no command: {hint}")
    try:
        return COMMANDS[chosen.command](arguments[1:])
    except UserError as error:
        print(f"headrace: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED


def serve(arguments: Sequence[str]) -> int:
    from headrace.engine import settings

    parser = Parser(prog="headrace serve", usage="headrace serve [MODEL] [OPTIONS]", description=SERVE)
    settings.add_arguments(parser)
    flags = vars(parser.parse(arguments))
    path = flags.pop("config", None)
    config = settings.load(flags, os.environ, path)

    from headrace.engine.fork_server import ForkServer

    try:
        # Its process imports what all others need while this one does the same.
        with ForkServer() as forks:
            from headrace.engine import supervisor
            from headrace.engine.checkpoint.resolve import resolve

            return supervisor.run(config, resolve(config), forks)
    except UserError:
        if config.log_level == "debug":
            import traceback

            traceback.print_exc()
        raise


def chat(arguments: Sequence[str]) -> int:
    from headrace.client import chat

    parser = Parser(prog="headrace chat", description="Talk to a running server. Ctrl-C stops the answer, Ctrl-D leaves.")
    chat.add_arguments(parser)
    return chat.run(parser.parse(arguments))


def bench(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["kernels"]:
        return bench_kernels(arguments[1:])
    from headrace.client import bench

    parser = Parser(prog="headrace bench", description="Load any OpenAI-compatible server and report its latencies and throughput.")
    bench.add_arguments(parser)
    return bench.run(parser.parse(arguments))


def bench_kernels(arguments: Sequence[str]) -> int:
    from headrace.engine import settings
    from headrace.workers import kernel_bench

    parser = Parser(prog="headrace bench kernels", description=kernel_bench.DESCRIPTION)
    settings.add_arguments(parser, kernel_bench.SETTINGS)
    kernel_bench.add_arguments(parser)
    chosen = parser.parse(arguments)
    flags = {name: value for name, value in vars(chosen).items() if name in kernel_bench.SETTINGS}
    return kernel_bench.run(settings.load(flags, os.environ, vars(chosen).get("config")), chosen)


def keys(arguments: Sequence[str]) -> int:
    from headrace.engine import keys

    parser = Parser(prog="headrace keys", description=keys.DESCRIPTION)
    keys.add_arguments(parser)
    return keys.run(parser.parse(arguments))


def doctor(arguments: Sequence[str]) -> int:
    from headrace.engine import doctor

    parser = Parser(prog="headrace doctor", description="What this machine has, which kernels run here, and what would be slow and why.")
    doctor.add_arguments(parser)
    return doctor.run(parser.parse(arguments))


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"serve": serve, "chat": chat, "bench": bench, "keys": keys, "doctor": doctor}

if __name__ == "__main__":
    sys.exit(main())
