"""Chat templates at arm's length: they are rendered in a process of their own, which may be lost.

A template is a program that came with the model. Jinja's sandbox (`chat.py`) keeps it from reaching out, not from looping for ever or from
building gigabytes; so its process gets a bounded address space and, for each conversation, a bounded time of computing. Beyond the first it
gets a MemoryError, beyond the second the system ends it: the conversation is refused, and the next one gets a new process.

    Renderer ── Load, then a ChatPrompt each ──▶ pipe ──▶ `python -m headrace.tokenizer_proc.renderer` ─▶ ChatTemplates
             ◀─ Loaded, then Rendered | Failed ─ pipe ◀─┘

A message is its length in four bytes and its MessagePack. The process ends with the pipe.
"""

import contextlib
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from typing import IO

import msgspec

from headrace.engine.messages.frontend import ChatPrompt
from headrace.engine.messages.wire import Message, encode
from headrace.tokenizer_proc.chat import ChatTemplates
from headrace.tokenizer_proc.rejection import Rejection

COMPUTE_S = 2
"""Seconds of computing that a conversation may take, or the templates to compile."""

WAIT_S = 10.0
"""Seconds after which its process is given up, should the system have no time for it."""

ADDRESS_SPACE = 1 << 30
"""Bytes; a Python with Jinja needs a tenth of it."""

_LENGTH = struct.Struct("<I")


class Load(Message):
    sources: dict[str, str]
    names: dict[str, str]


class Loaded(Message):
    fault: str | None


class Rendered(Message):
    text: str


class Failed(Message):
    """The fields of a `Rejection`."""

    message: str
    param: str | None
    code: str
    status: int


class _Lost(Exception):
    """The process ended, or does not answer."""


class Renderer:
    """The templates of one model, as `ChatTemplates` has them; safe to call from several threads."""

    def __init__(self) -> None:
        self.fault: str | None = None
        """Why there is no template to use, for a user."""
        self._load = Load({}, {})
        self._lock = threading.Lock()
        self._decoder = msgspec.msgpack.Decoder(Loaded | Rendered | Failed)
        self._process: subprocess.Popen[bytes] | None = None
        self._start()

    @property
    def usable(self) -> bool:
        return self.fault is None

    def load(self, sources: dict[str, str], names: dict[str, str]) -> None:
        """Compile the templates. `fault` says whether that worked."""
        self._load = Load(sources, names)
        try:
            loaded = self._ask(self._load)
        except _Lost:
            self._stop()
            self.fault = f"the model's chat template does not compile within {COMPUTE_S} s: use /v1/completions"
            return
        assert isinstance(loaded, Loaded)
        self.fault = loaded.fault

    def render(self, prompt: ChatPrompt) -> str:
        """See `ChatTemplates.render`."""
        if self.fault is not None:
            raise Rejection(self.fault, "messages", "no_chat_template")
        with self._lock:
            try:
                if self._process is None or self._process.poll() is not None:
                    self._stop()
                    self._start()
                    self._ask(self._load)
                answer = self._ask(prompt)
            except _Lost:
                self._stop()
                raise Rejection(
                    f"the chat template does not end within {COMPUTE_S} s for these messages: send a shorter conversation",
                    "messages",
                    "chat_template_failed",
                ) from None
        if isinstance(answer, Failed):
            raise Rejection(answer.message, answer.param, answer.code, answer.status)
        assert isinstance(answer, Rendered)
        return answer.text

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._stop()

    def _start(self) -> None:
        command = [sys.executable, "-m", "headrace.tokenizer_proc.renderer"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)

    def _stop(self) -> None:
        if process := self._process:
            self._process = None
            process.kill()
            for pipe in (process.stdin, process.stdout):
                assert pipe
                pipe.close()
            process.wait()

    def _ask(self, message: Message) -> Message:
        process = self._process
        assert process and process.stdin and process.stdout
        try:
            _write(process.stdin, message)
            deadline = time.monotonic() + WAIT_S
            return self._decoder.decode(_read(process.stdout, deadline))
        except (OSError, EOFError, msgspec.MsgspecError):
            raise _Lost from None


def _write(pipe: IO[bytes], message: Message) -> None:
    content = encode(message)
    rest = memoryview(_LENGTH.pack(len(content)) + content)
    while rest:
        rest = rest[pipe.write(rest) :]


def _read(pipe: IO[bytes], deadline: float | None = None) -> bytes:
    """The next message; EOFError when none comes any more, or not before `deadline` (monotonic seconds)."""
    (length,) = _LENGTH.unpack(_exactly(pipe, _LENGTH.size, deadline))
    return _exactly(pipe, length, deadline)


def _exactly(pipe: IO[bytes], count: int, deadline: float | None) -> bytes:
    pieces = []
    while count:
        if deadline is not None and not select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise EOFError
        piece = pipe.read(count)
        if not piece:
            raise EOFError
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)


def _answer(templates: ChatTemplates, prompt: ChatPrompt) -> Message:
    try:
        return Rendered(templates.render(prompt))
    except Rejection as rejection:
        return Failed(rejection.message, rejection.param, rejection.code, rejection.status)
    except Exception as error:  # what is wrong with one conversation is not the others' trouble
        return Failed(f"the conversation could not be rendered ({type(error).__name__})", "messages", "chat_template_failed", 400)


@contextlib.contextmanager
def _bounded():
    """Within this, computing for longer than COMPUTE_S ends the process (SIGPROF, whose default is to do that)."""
    signal.setitimer(signal.ITIMER_PROF, COMPUTE_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def main() -> None:
    """Serve one `Renderer` over the standard streams."""
    requests, answers = open(0, "rb", buffering=0), open(1, "wb", buffering=0)  # noqa: SIM115
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    decoder = msgspec.msgpack.Decoder(ChatPrompt)
    with contextlib.suppress(EOFError, BrokenPipeError):
        load = msgspec.msgpack.decode(_read(requests), type=Load)
        with _bounded():
            templates = ChatTemplates(load.sources, load.names)
        _write(answers, Loaded(templates.fault))
        while True:
            prompt = decoder.decode(_read(requests))
            with _bounded():
                answer = _answer(templates, prompt)
            _write(answers, answer)


if __name__ == "__main__":
    main()
