"""A client that does not read is not waited for, and loses nothing when it reads after all."""

import json
import socket
import struct
import threading

from tests.server.test_disconnect import post

BODY = b'{"prompt":"x","max_tokens":8000,"ignore_eos":true,"stream":true,"seed":7}'


def slow(connection: socket.socket) -> socket.socket:
    """Let the other side fill what little room there is."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    return connection


def text_of(raw: bytes) -> str:
    # The body is in HTTP chunks; their sizes stand on lines of their own.
    events = [line[6:] for line in raw.splitlines() if line.startswith(b"data: {")]
    return "".join(json.loads(event)["choices"][0]["text"] for event in events)


def read_all(connection: socket.socket) -> bytes:
    raw = b""
    while b"data: [DONE]" not in raw[-200:]:
        piece = connection.recv(65536)
        assert piece, raw[-300:]
        raw += piece
    return raw


def test_what_a_slow_client_reads_at_last_is_complete(served):
    quick = post(served, BODY)
    expected = text_of(read_all(quick))
    lazy = slow(post(served, BODY))
    # The kernel asks a closed window ever more rarely, so the wait for the rest grows with the time until here.
    lazy.settimeout(60)
    served.until_running(1)
    served.until_idle(60)
    lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    assert text_of(read_all(lazy)) == expected


def test_a_slow_client_that_goes_away_hurts_nobody(served):
    before = served.pids()
    clients = [slow(post(served, BODY)) for _ in range(4)]
    served.until_running(1)
    done = threading.Event()

    def quick() -> None:
        read_all(post(served, BODY))
        done.set()

    reader = threading.Thread(target=quick)
    reader.start()
    assert done.wait(60), "others stream on"
    reader.join()
    for client in clients:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
    served.until_idle(60)
    assert served.pids() == before
