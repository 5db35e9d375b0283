"""Requests as bytes on a socket: encodings that are not read, bodies that break off, and clients of HTTP/1.0."""

import gzip
import json
import socket

BODY = json.dumps({"prompt": "hi", "max_tokens": 4, "stream": True}).encode()


def answer_to(served, head: str, body: bytes = b"") -> tuple[str, bytes]:
    """The status line and the body of the answer, read until the server closes."""
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body)
        received = b""
        while more := connection.recv(65536):
            received += more
    status, _, rest = received.partition(b"\r\n")
    return status.decode(), rest.partition(b"\r\n\r\n")[2]


def test_a_compressed_body_is_refused_and_not_unpacked(served):
    packed = gzip.compress(b" " * 10_000_000 + BODY)
    head = f"POST /v1/completions HTTP/1.1\nHost: x\nContent-Encoding: gzip\nConnection: close\nContent-Length: {len(packed)}"
    status, body = answer_to(served, head, packed)
    assert " 415 " in status
    assert "Content-Encoding 'gzip'" in json.loads(body)["error"]["message"]


def test_a_body_in_broken_chunks_is_a_bad_request(served):
    head = "POST /v1/completions HTTP/1.1\nHost: x\nTransfer-Encoding: chunked\nConnection: close"
    status, _ = answer_to(served, head, b'5\r\n{"pro\r\nzz\r\n')
    assert " 400 " in status


def test_a_client_of_http_1_0_gets_its_stream_unchunked_to_the_end_of_the_connection(served):
    status, body = answer_to(served, f"POST /v1/completions HTTP/1.0\nHost: x\nContent-Length: {len(BODY)}", BODY)
    assert " 200 " in status
    events = [line for line in body.decode().splitlines() if line.startswith("data: ")]
    assert events[-1] == "data: [DONE]"
    assert sum(bool(json.loads(event[6:])["choices"][0]["text"]) for event in events[:-2] if '"choices":[{' in event) >= 1
    assert body.decode().startswith(":\n\n")
