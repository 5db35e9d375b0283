"""The terminal chat, driven through a real pseudo-terminal, and through pipes."""

import contextlib
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.client.fake_server import Behaviour, FakeServer, serving

PROGRAM = (
    "import argparse, sys\n"
    "from headrace.client import chat\n"
    "parser = argparse.ArgumentParser()\n"
    "chat.add_arguments(parser)\n"
    "sys.exit(chat.run(parser.parse_args()))"
)
PROMPT = "\x1b[1m> \x1b[0m"


class Terminal:
    """A chat on a pseudo-terminal."""

    def __init__(self, home: Path, *words: str) -> None:
        self.main, child_end = pty.openpty()
        environment = {**os.environ, "HOME": str(home), "TERM": "dumb", "INPUTRC": os.devnull}
        environment.pop("XDG_STATE_HOME", None)
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *words],
            stdin=child_end,
            stdout=child_end,
            stderr=child_end,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
        )
        os.close(child_end)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.main, text.encode())

    def wait_for(self, text: str, seconds: float = 20) -> str:
        """What was shown up to and with `text`, which is then forgotten."""
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            ready, _, _ = select.select([self.main], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{text!r} was not shown, but {self.seen!r}"
            try:
                piece = os.read(self.main, 65536)
            except OSError:
                piece = b""
            assert piece, f"the chat ended before {text!r}: {self.seen!r}"
            self.seen += piece.decode()
        shown, _, self.seen = self.seen.partition(text)
        return shown + text

    def say(self, text: str) -> None:
        self.wait_for(PROMPT)
        self.type(text)

    def interrupt(self) -> None:
        """Press Ctrl-C until there is a prompt: a signal that comes just before readline waits is only seen with the next key."""
        for _ in range(5):
            self.type("\x03")
            with contextlib.suppress(AssertionError):
                self.wait_for(PROMPT, 4)
                self.seen = PROMPT + self.seen
                return
        raise AssertionError(f"there was no prompt after Ctrl-C, but {self.seen!r}")

    def leave(self) -> int:
        self.say("\x04")
        return self.process.wait(20)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with serving(Behaviour(stops_after=4)) as one:
        yield one


@pytest.fixture
def terminal(server: FakeServer, tmp_path: Path) -> Iterator[Terminal]:
    one = Terminal(tmp_path, "--url", server.url, "--temperature", "0", "--max-tokens", "9")
    yield one
    one.process.kill()
    one.process.wait()
    os.close(one.main)


def test_a_conversation_goes_on_over_several_turns(terminal: Terminal, server: FakeServer) -> None:
    assert "fake-model" in terminal.wait_for("/help")
    terminal.say("hello\n")
    terminal.wait_for(" w0 w1 w2 w3")
    assert "4 tokens" in terminal.wait_for(" s\x1b[0m")
    terminal.say("and now\n")
    terminal.wait_for(" w3")
    assert terminal.leave() == 0
    assert server.requests[0]["temperature"] == 0 and server.requests[0]["max_tokens"] == 9
    assert [message["role"] for message in server.requests[1]["messages"]] == ["user", "assistant", "user"]
    assert server.requests[1]["messages"][1]["content"] == " w0 w1 w2 w3"


def test_ctrl_c_stops_the_answer_and_not_the_program(terminal: Terminal, server: FakeServer) -> None:
    server.behaviour = Behaviour(token_delay_s=60)
    terminal.say("hello\n")
    terminal.wait_for(" w0")
    terminal.type("\x03")
    terminal.wait_for("stopped")
    assert server.disconnects.acquire(timeout=10)
    server.behaviour = Behaviour(stops_after=2)
    terminal.say("again\n")
    terminal.wait_for(" w0 w1")
    assert terminal.leave() == 0
    assert server.requests[1]["messages"][1] == {"role": "assistant", "content": " w0"}


def test_ctrl_c_at_the_prompt_gives_a_new_prompt(terminal: Terminal, server: FakeServer) -> None:
    terminal.say("never sent")
    # Once it is echoed, readline waits for the next key, and a signal finds it there.
    terminal.wait_for("never sent")
    terminal.interrupt()
    assert terminal.leave() == 0
    assert server.requests == []


def test_commands_change_the_conversation(terminal: Terminal, server: FakeServer) -> None:
    terminal.say("/system be brief\n")
    terminal.say("hello\n")
    terminal.wait_for(" w3")
    terminal.say("/retry\n")
    terminal.wait_for(" w3")
    terminal.say("/clear\n")
    terminal.say("fresh\n")
    terminal.wait_for(" w3")
    terminal.say("/nonsense\n")
    terminal.wait_for("no command")
    terminal.say("/help\n")
    terminal.wait_for("/system TEXT")
    terminal.say("/exit\n")
    assert terminal.process.wait(20) == 0
    system = {"role": "system", "content": "be brief"}
    assert [body["messages"] for body in server.requests] == [
        [system, {"role": "user", "content": "hello"}],
        [system, {"role": "user", "content": "hello"}],
        [system, {"role": "user", "content": "fresh"}],
    ]


def test_a_trailing_backslash_goes_on_in_the_next_line(terminal: Terminal, server: FakeServer) -> None:
    terminal.say("one\\\ntwo\n")
    terminal.wait_for(" w3")
    terminal.leave()
    assert server.requests[0]["messages"][0]["content"] == "one\ntwo"


def test_an_error_is_shown_and_the_turn_can_be_tried_again(terminal: Terminal, server: FakeServer) -> None:
    server.behaviour.failures = [(400, {})]
    terminal.say("hello\n")
    terminal.wait_for("refused with 400")
    terminal.say("/retry\n")
    terminal.wait_for(" w3")
    terminal.leave()
    assert server.requests[1]["messages"] == [{"role": "user", "content": "hello"}]


def test_the_history_outlives_the_program_and_is_private(terminal: Terminal, server: FakeServer, tmp_path: Path) -> None:
    terminal.say("remember me\n")
    terminal.wait_for(" w3")
    terminal.leave()
    file = tmp_path / ".local" / "state" / "headrace" / "chat_history"
    assert "remember me" in file.read_text()
    assert file.stat().st_mode & 0o077 == 0


def pipe(text: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", PROGRAM, *words], input=text, capture_output=True, text=True, timeout=60)


def test_a_pipe_gets_an_answer_a_line_and_nothing_else(server: FakeServer) -> None:
    done = pipe("first\nsecond\\\nhalf\n\n", "--url", server.url, "--system", "be brief")
    assert (done.returncode, done.stdout, done.stderr) == (0, " w0 w1 w2 w3\n w0 w1 w2 w3\n", "")
    assert server.requests[1]["messages"][-1]["content"] == "second\nhalf"
    assert server.requests[1]["messages"][0] == {"role": "system", "content": "be brief"}


def test_a_pipe_ends_with_an_error_when_a_turn_fails() -> None:
    with serving(Behaviour(break_after=2, token_delay_s=0.02)) as server:
        done = pipe("first\nsecond\n", "--url", server.url)
    assert (done.returncode, done.stdout) == (1, " w0 w1\n")
    assert done.stderr.startswith("error:") and len(server.requests) == 1


def test_a_missing_server_is_one_line_that_names_the_way_out() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        done = pipe("hello\n", "--url", f"http://127.0.0.1:{free.getsockname()[1]}")
    assert done.returncode == 1 and done.stdout == ""
    assert "headrace serve" in done.stderr and done.stderr.count("\n") == 1


def test_a_pipe_that_nobody_reads_ends_without_a_trace(server: FakeServer) -> None:
    server.behaviour = Behaviour(token_delay_s=0.01)
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "--url", server.url, "--max-tokens", "100000"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin and process.stdout and process.stderr
    process.stdin.write("hello\n")
    process.stdin.flush()
    assert process.stdout.read(3) == " w0"
    process.stdout.close()
    assert process.wait(20) == 1
    assert "Traceback" not in process.stderr.read()
    assert server.disconnects.acquire(timeout=10)
    process.stdin.close()
    process.stderr.close()


def test_an_interrupted_pipe_ends(server: FakeServer) -> None:
    server.behaviour = Behaviour(token_delay_s=60)
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "--url", server.url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin and process.stdout
    process.stdin.write("hello\n")
    process.stdin.flush()
    assert process.stdout.read(3) == " w0"
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    process.stdin.close()
    process.stdout.close()
