"""Start `headrace serve`, stream one answer to the terminal, and go on serving: the second half of scripts/quickstart.

    first_answer ──starts──▶ headrace serve ──HTTP──▶ answer on stdout; everything else goes to stderr

With `--once PROMPT` the server listens on a free port and is stopped after the answer. Options it does not know itself are handed to
`headrace serve` as they stand. The server ends with this process, however that ends.
"""

import argparse
import ctypes
import http.client
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

from headrace.client import Client, ClientError

PROMPT = "What does a water wheel do? Answer in two sentences."
MOST_TOKENS = 256
READY_LIMIT = 600.0
"""Seconds a server may take to load its model."""
STOP_LIMIT = 10.0
PR_SET_PDEATHSIG = 1


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog="scripts/quickstart", allow_abbrev=False, add_help=False)
    parser.add_argument("--once", metavar="PROMPT")
    # What the server would take from the environment, this program must know as well.
    parser.add_argument("--host", default=os.environ.get("HEADRACE_HOST", "127.0.0.1"))
    parser.add_argument("--port", type=int, default=os.environ.get("HEADRACE_PORT"))
    parser.add_argument("--api-key", default=os.environ.get("HEADRACE_API_KEY"))
    options, rest = parser.parse_known_args(arguments)
    if options.port is None:
        options.port = 0 if options.once is not None else 8000
    return options, rest


def choose_port(host: str, port: int) -> int:
    """The port to listen on, 0 replaced by a free one. SystemExit where it cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return probe.getsockname()[1]
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a port number"
        sys.exit(f"error: cannot listen on {host}:{port} ({reason}): choose another with --port or --host")


def start_server(options: argparse.Namespace, rest: list[str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "headrace.engine.cli", "serve", "--host", options.host, "--port", str(options.port), *rest]
    # A key on a command line is there for everybody to read.
    key = {} if options.api_key is None else {"HEADRACE_API_KEY": options.api_key}
    libc = ctypes.CDLL(None)

    def tie_to_parent() -> None:
        # A shell starts background jobs with SIGINT ignored, and that is inherited.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGINT)

    return subprocess.Popen(command, env=os.environ | key, stdout=sys.stderr, preexec_fn=tie_to_parent)


def is_ready(host: str, port: int) -> bool:
    connection = http.client.HTTPConnection(host, port, timeout=5)
    try:
        connection.request("GET", "/health/ready")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def wait_until(ready: Callable[[], bool], server: subprocess.Popen) -> None:
    """Return when the server is ready. SystemExit with its own status where it ended instead: it has said why."""
    deadline = time.monotonic() + READY_LIMIT
    while not ready():
        if server.poll() is not None:
            sys.exit(server.returncode or 1)
        if time.monotonic() > deadline:
            sys.exit(f"error: the server was not ready after {READY_LIMIT:.0f} s")
        time.sleep(0.05)


def stream_answer(url: str, api_key: str | None, prompt: str) -> None:
    """Write the answer to stdout piece by piece, then its length and speed to stderr."""
    began = time.monotonic()
    with Client(url, api_key=api_key) as client:
        usage = None
        stream = client.chat_stream(
            [{"role": "user", "content": prompt}], max_tokens=MOST_TOKENS, temperature=0, stream_options={"include_usage": True}
        )
        for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                print(choice.delta.content or "", end="", flush=True)
        print(flush=True)
    if usage is not None:
        seconds = time.monotonic() - began
        say(f"({usage.completion_tokens} tokens in {seconds:.1f} s)")


def invitation(url: str, api_key: str | None) -> str:
    body = '{"messages": [{"role": "user", "content": "Name three rivers."}], "stream": true}'
    key = f" -H {shlex.quote(f'Authorization: Bearer {api_key}')}" if api_key else ""
    return (
        f"\nHeadrace serves the OpenAI API at {url}/v1. Try, in another terminal:\n\n"
        f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} \\\n    -d '{body}'\n\n"
        "Ctrl-C stops it."
    )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def stop(server: subprocess.Popen) -> None:
    if server.poll() is None:
        server.send_signal(signal.SIGINT)
    try:
        server.wait(STOP_LIMIT)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def main() -> int:
    options, rest = parse(sys.argv[1:])
    options.port = choose_port(options.host, options.port)
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(options.host, options.host)
    url = f"http://[{reachable}]:{options.port}" if ":" in reachable else f"http://{reachable}:{options.port}"
    began = time.monotonic()
    say("Starting the server …")
    server = start_server(options, rest)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: server.terminate())
    try:
        wait_until(lambda: is_ready(reachable, options.port), server)
        say(f"Ready in {time.monotonic() - began:.1f} s.\n")
        if options.once is None:
            say(f"> {PROMPT}")
        stream_answer(url, options.api_key, PROMPT if options.once is None else options.once)
        if options.once is not None:
            return 0
        say(invitation(url, options.api_key))
        return server.wait()
    except ClientError as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return 130 if options.once is not None else 0
    finally:
        stop(server)


if __name__ == "__main__":
    sys.exit(main())
