"""A client that goes away takes its requests along."""

import socket
import struct

import pytest


def post(served, body: bytes, path: str = "/v1/completions") -> socket.socket:
    host, port = served.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=10)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
@pytest.mark.parametrize("stream", ["true", "false"])
@pytest.mark.parametrize("n", [1, 5])
def test_a_client_that_disconnects_has_its_requests_aborted(served, stream, reset, n):
    before = (
        served.metric("headrace_requests_ended_total", reason="abort")
        if served.has_metric("headrace_requests_ended_total", reason="abort")
        else 0
    )
    body = b'{"prompt":"x","max_tokens":8000,"ignore_eos":true,"stream":%b,"n":%d}' % (stream.encode(), n)
    connection = post(served, body)
    if stream == "true":
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
    else:
        served.until_running(n)
    if reset:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    served.until_idle()
    assert served.metric("headrace_requests_ended_total", reason="abort") == before + n
