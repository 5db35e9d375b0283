"""`headrace chat`: talk to a running server from a terminal, or through a pipe.

    terminal   prompt, history, commands; Ctrl-C stops the answer, Ctrl-D leaves; speed below each answer
    pipe       each line of stdin is one turn, its answer goes to stdout, nothing else does

The conversation lives here and is sent whole with each turn, as the protocol wants it. The server is reached through `Client`
alone, so any OpenAI-compatible server will do.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

import msgspec

from headrace.client.calls import DEFAULT_URL
from headrace.client.errors import ClientError, Disconnected, Unreachable
from headrace.client.parameters import ChatParameters
from headrace.client.sync import Client

_INTERRUPTED = 130
_MAX_HISTORY = 1000
_HELP = """\
/system TEXT   set the system prompt; alone, show it
/retry         ask again for the last answer
/clear         forget the conversation
/exit          leave, as Ctrl-D does
A line that ends in \\ goes on in the next. Ctrl-C stops an answer."""
# What a model writes is text: it may not move the cursor, ring or recolour.
_CONTROLS = {code: None for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}


class Conversation(msgspec.Struct):
    """What is sent with each turn."""

    system: str | None = None
    turns: list[dict[str, str]] = []

    def messages(self) -> list[dict[str, str]]:
        first = [{"role": "system", "content": self.system}] if self.system else []
        return first + self.turns


class Answer(msgspec.Struct):
    """One answer, as far as it came."""

    text: str = ""
    tokens: int = 0
    first_s: float | None = None
    """Seconds from the question to the first text."""
    total_s: float = 0.0
    stopped: bool = False
    """By Ctrl-C."""
    finish_reason: str | None = None

    def speed(self) -> str:
        """A line for below the answer."""
        parts = [f"{self.tokens} tokens"]
        if self.first_s is not None:
            decoding = self.total_s - self.first_s
            if self.tokens > 1 and decoding > 0:
                parts.append(f"{(self.tokens - 1) / decoding:.1f} tok/s")
            parts.append(f"first after {self.first_s:.2f} s")
        if self.stopped:
            parts.append("stopped")
        elif self.finish_reason == "length":
            parts.append("cut at the length limit")
        return " · ".join(parts)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `headrace chat`."""
    add = parser.add_argument
    add("--url", default=DEFAULT_URL, help="any OpenAI-compatible server (default: %(default)s)")
    add("--model", help="model name to ask for (default: the first that the server lists)")
    add("--api-key", help="sent as a bearer token")
    add("--system", metavar="TEXT", help="system prompt")
    add("--temperature", type=float, metavar="T", help="0 always takes the likeliest token (default: the server's)")
    add("--max-tokens", type=int, metavar="N", help="longest answer (default: the server's)")


def run(arguments: argparse.Namespace) -> int:
    """`headrace chat`. Exit status 0, 1 when there is no server or (through a pipe) a turn failed, 130 when a pipe is interrupted."""
    parameters: ChatParameters = {"stream_options": {"include_usage": True}}
    if arguments.temperature is not None:
        parameters["temperature"] = arguments.temperature
    if arguments.max_tokens is not None:
        parameters["max_tokens"] = arguments.max_tokens
    try:
        client = Client(arguments.url, arguments.api_key)
    except ValueError as error:
        return _fail(str(error))
    with client:
        try:
            parameters["model"] = arguments.model or client.default_model()
        except ClientError as error:
            return _fail(_explain(error, arguments.url))
        chat = _Chat(client, parameters, Conversation(arguments.system), arguments.url)
        if sys.stdin.isatty() and sys.stdout.isatty():
            chat.at_terminal()
            return 0
        try:
            return chat.through_pipe()
        except KeyboardInterrupt:
            return _INTERRUPTED


class _Chat:
    def __init__(self, client: Client, parameters: ChatParameters, conversation: Conversation, url: str) -> None:
        self._client = client
        self._parameters = parameters
        self._conversation = conversation
        self._url = url
        self._decorated = False

    def at_terminal(self) -> None:
        """Read, answer, repeat, until Ctrl-D or /exit."""
        self._decorated = True
        print(_dim(f"{self._parameters.get('model')} at {self._url} · /help for commands, Ctrl-D to leave"))
        with _line_history():
            while True:
                try:
                    entry = _read_entry()
                except KeyboardInterrupt:
                    print()
                    continue
                except EOFError:
                    print()
                    return
                if not entry.strip():
                    continue
                if entry.startswith("/"):
                    if not self._command(entry):
                        return
                else:
                    self._turn(entry)

    def through_pipe(self) -> int:
        """Answer each line of stdin; the exit status."""
        for entry in _entries_of_pipe():
            if entry.startswith("/"):
                if not self._command(entry):
                    break
            elif entry.strip() and not self._turn(entry):
                return 1
        return 0

    def _command(self, entry: str) -> bool:
        """Obey a line that starts with a slash. False to leave."""
        name, _, rest = entry.strip().partition(" ")
        conversation = self._conversation
        if name in ("/exit", "/quit"):
            return False
        if name == "/clear":
            conversation.turns.clear()
            self._remark("the conversation is forgotten")
        elif name == "/system":
            if rest.strip():
                conversation.system = rest.strip()
                self._remark("system prompt set")
            else:
                self._remark(conversation.system or "there is no system prompt")
        elif name == "/retry":
            if conversation.turns and conversation.turns[-1]["role"] == "assistant":
                conversation.turns.pop()
            if conversation.turns:
                self._turn(conversation.turns.pop()["content"])
            else:
                self._remark("there is nothing to ask again")
        elif name == "/help":
            self._remark(_HELP)
        else:
            self._remark(f"{name} is no command; /help lists them")
        return True

    def _turn(self, text: str) -> bool:
        """Ask, print the answer as it comes, keep both. False when it failed; /retry then asks again."""
        turns = self._conversation.turns
        if turns and turns[-1]["role"] == "user":
            # It failed and was not tried again: templates want the roles to alternate.
            turns.pop()
        turns.append({"role": "user", "content": text})
        answer = Answer()
        failure: ClientError | None = None
        try:
            self._stream_to(answer)
        except ClientError as error:
            failure = error
        except KeyboardInterrupt:
            if not self._decorated:
                raise
            answer.stopped = True
        if answer.text and not answer.text.endswith("\n"):
            print(flush=True)
        if failure is not None:
            print(_red(_explain(failure, self._url)) if self._decorated else _explain(failure, self._url), file=sys.stderr, flush=True)
        if answer.text:
            turns.append({"role": "assistant", "content": answer.text})
        if self._decorated and (answer.text or failure is None):
            print(_dim(answer.speed()))
        return failure is None

    def _stream_to(self, answer: Answer) -> None:
        start = monotonic()
        try:
            with self._client.chat_stream(self._conversation.messages(), **self._parameters) as stream:
                for chunk in stream:
                    answer.total_s = monotonic() - start
                    if chunk.usage is not None:
                        answer.tokens = chunk.usage.completion_tokens
                    for choice in chunk.choices:
                        answer.finish_reason = choice.finish_reason or answer.finish_reason
                        if text := choice.delta.content:
                            answer.first_s = answer.total_s if answer.first_s is None else answer.first_s
                            # A chunk counts as a token until the usage says how many there were.
                            answer.tokens += 1
                            answer.text += text
                            print(text.translate(_CONTROLS) if self._decorated else text, end="", flush=True)
        except BrokenPipeError:
            # Nobody reads our output any more. Python would complain once more when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise Disconnected("the output was closed") from None

    def _remark(self, text: str) -> None:
        if self._decorated:
            print(_dim(text))


def _read_entry() -> str:
    """One entry from the terminal; lines that end in a backslash are joined."""
    lines = [input("\x01\x1b[1m\x02> \x01\x1b[0m\x02")]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input(". "))
    return "\n".join(lines)


def _entries_of_pipe() -> Iterator[str]:
    lines: list[str] = []
    for line in sys.stdin:
        lines.append(line.rstrip("\n"))
        if lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
        else:
            yield "\n".join(lines)
            lines = []
    if lines:
        yield "\n".join(lines)


@contextlib.contextmanager
def _line_history() -> Iterator[None]:
    """Line editing for `input`, with the history of earlier sessions. Works without readline or a place for the file."""
    try:
        import readline
    except ImportError:
        yield
        return
    state = os.environ.get("XDG_STATE_HOME")
    file = (Path(state) if state else Path.home() / ".local" / "state") / "headrace" / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    readline.set_history_length(_MAX_HISTORY)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            # What was asked is nobody else's business.
            os.close(os.open(file, os.O_CREAT | os.O_WRONLY, 0o600))
            readline.write_history_file(file)


def _explain(error: ClientError, url: str) -> str:
    if isinstance(error, Unreachable):
        return f"nothing listens at {url}: start a server with `headrace serve`, or give the --url of one"
    return f"error: {error}"


def _fail(text: str) -> int:
    print(f"headrace chat: {text}", file=sys.stderr)
    return 1


def _dim(text: str) -> str:
    return f"\x1b[2m{text}\x1b[0m"


def _red(text: str) -> str:
    return f"\x1b[31m{text}\x1b[0m"
