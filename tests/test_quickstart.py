"""The newcomer's command, as a newcomer runs it: real processes, the real model, nothing but stdout and an exit status to look at."""

import http.client
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

QUICKSTART = Path(__file__).resolve().parent.parent / "scripts" / "quickstart"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    """One run of its installing part, so that what follows are second runs."""
    subprocess.run(["bash", "-c", f". {QUICKSTART.parent / 'lib' / 'environment.sh'}; make_environment"], check=True)


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def quickstart(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([QUICKSTART, *arguments], capture_output=True, text=True, timeout=120, check=False)


def test_once_prints_the_answer_and_nothing_else_on_stdout() -> None:
    done = quickstart("--once", "What is the capital of Japan?")
    assert done.returncode == 0, done.stderr
    assert "Tokyo" in done.stdout
    assert "Installing" not in done.stderr
    assert "Ready in" not in done.stdout


def test_a_port_in_use_is_named_in_one_line(taken_port: int) -> None:
    done = quickstart("--port", str(taken_port))
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: cannot listen on 127.0.0.1:{taken_port} (Address already in use)")
    assert len(done.stderr.splitlines()) == 1


def test_an_unknown_option_is_refused_by_the_server_and_its_status_comes_back() -> None:
    done = quickstart("--once", "Hello", "--no-such-option")
    assert done.returncode not in (0, None)
    assert "--no-such-option" in done.stderr
    assert "Traceback" not in done.stderr


def test_it_serves_until_ctrl_c_and_then_nothing_listens() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [QUICKSTART, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if "Ctrl-C stops it." in line:
            break
    else:
        pytest.fail("".join(seen))
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", "/v1/models")
    assert connection.getresponse().status == 200
    connection.close()
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(10) == 0
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0
