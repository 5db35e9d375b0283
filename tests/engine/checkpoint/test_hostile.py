"""Checkpoints made to do harm: whatever a file claims, reading it ends soon, with little memory, and in one line that names the file."""

import json
import struct
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.engine.checkpoint import hf
from headrace.engine.checkpoint.gguf import GGUFFile
from headrace.engine.checkpoint.hf import INDEX, read_config, read_header, read_tensors
from headrace.engine.errors import UserError
from tests.engine.checkpoint.samples import HIDDEN, write_directory, write_gguf
from tests.engine.checkpoint.test_gguf import entry, header, string

LITTLE = 64 << 20
SOON = 20.0
"""Seconds, on a machine that is busy with other tests."""


@contextmanager
def little_and_soon(most: int = LITTLE) -> Iterator[None]:
    began = time.monotonic()
    tracemalloc.start()
    try:
        yield
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < most, f"{peak} bytes were taken"
    assert time.monotonic() - began < SOON


def read_gguf(path: Path) -> None:
    """Everything that a file says."""
    file = GGUFFile(path)
    for key in file.metadata:
        file.metadata[key]
    for name in file.tensors:
        file.tensor_bytes(name)


def fault(read: Callable[[Path], object], path: Path, *, named: Path | None = None) -> str:
    with pytest.raises(UserError) as caught, little_and_soon():
        read(path)
    message = str(caught.value)
    assert str(named or path) in message
    assert "\n" not in message and len(message) < 1000
    return message


def safetensors(raw: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(raw)) + raw + data


@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, kind: str) -> None:
    if kind == "gguf":
        whole, read = write_gguf(tmp_path / "m.gguf").read_bytes(), read_gguf
        cuts = range(len(whole) - 8 * HIDDEN * 4)
    else:
        whole, read = (write_directory(tmp_path / "m") / "model.safetensors").read_bytes(), read_header
        cuts = range(8 + int.from_bytes(whole[:8], "little"))
    path = tmp_path / "cut"
    for cut in [*cuts, len(whole) - 1]:
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError) as caught:
            read(path)
        assert str(path) in str(caught.value)


NESTED = struct.pack("<IQ", 9, 4_000) + (struct.pack("<IQ", 9, 1) + struct.pack("<IQ", 9, 1) + struct.pack("<IQ", 0, 0)) * 4_000
GGUF_BOMBS = {
    "a key of 64 GiB": header(struct.pack("<Q", 1 << 36), 1),
    "a string of 16 EiB": header(string("k") + struct.pack("<IQ", 8, (1 << 64) - 1), 1),
    "numbers whose bytes overflow": header(string("k") + struct.pack("<IIQ", 9, 12, (1 << 64) - 1), 1),
    "more values than there are bytes": header(b"", (1 << 64) - 1),
    "more tensors than there are bytes": header(tensor_count=(1 << 64) - 1),
    "a shape whose product overflows": header(tensors=entry("t", ((1 << 63), (1 << 63), (1 << 63), 32)) + bytes(99), tensor_count=1),
    "a shape whose product wraps to nothing": header(tensors=entry("t", (1 << 32, 1 << 32)) + bytes(99), tensor_count=1),
    "an offset that wraps": header(tensors=entry("t", (4,), 0, (1 << 64) - 32) + bytes(99), tensor_count=1),
    "arrays in arrays that claim more": header(string("k") + struct.pack("<I", 9) + NESTED[:-6], 1),
    "arrays too deep": header(string("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 100_000, 1),
    "strings that end beyond the file": header(
        string("k") + struct.pack("<IIQ", 9, 8, 3) + string("a") + struct.pack("<Q", 1 << 62) * 2, 1
    ),
    "tensors that overlap in their last byte": header(tensors=entry("t", (8,), 0, 0) + entry("u", (7,), 0, 0) + bytes(199), tensor_count=2),
    "an alignment of 2⁶³": header(string("general.alignment") + struct.pack("<IQ", 10, 1 << 63), 1, entry("t", (4,)) + bytes(99), 1),
    "another magic": b"GGML" + header()[4:],
    "a magic alone": b"GGUF",
}


@pytest.mark.parametrize("what", GGUF_BOMBS)
def test_a_gguf_file_that_claims_the_impossible_is_refused(tmp_path: Path, what: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(GGUF_BOMBS[what])
    fault(read_gguf, path)


SAFETENSORS_BOMBS = {
    "a header of 16 EiB": struct.pack("<Q", (1 << 64) - 1) + b"{}",
    "a million empty objects": safetensors(b"{" + b",".join(b'"%d":{}' % place for place in range(1_100_000)) + b"}"),
    "ten million numbers": safetensors(b'{"t":{"dtype":"F32","shape":[' + b"1," * 10_000_000 + b'1],"data_offsets":[0,4]}}', bytes(4)),
    "ten million keys of its own": safetensors(b'{"__metadata__":{' + b",".join([b'"k":"v"'] * 2_000_000) + b"}}"),
    "arrays a million deep": safetensors(b'{"t":' + b"[" * 1_000_000),
    "objects a million deep": safetensors(b'{"t":' * 1_000_000),
    "a number of a million digits": safetensors(
        b'{"t":{"dtype":"F32","shape":[' + b"9" * 1_000_000 + b'],"data_offsets":[0,4]}}', bytes(4)
    ),
    "a type of a million letters": safetensors(b'{"t":{"dtype":"' + b"F" * 1_000_000 + b'","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "a name of a million letters": safetensors(b'{"' + b"n" * 1_000_000 + b'":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', bytes(4)),
    "a shape whose product overflows": safetensors(
        json.dumps({"t": {"dtype": "F32", "shape": [1 << 32, 1 << 32], "data_offsets": [0, 0]}}).encode()
    ),
    "offsets the wrong way round": safetensors(
        json.dumps({"t": {"dtype": "F32", "shape": [1], "data_offsets": [8, 4]}}).encode(), bytes(8)
    ),
    "a negative offset": safetensors(json.dumps({"t": {"dtype": "U8", "shape": [4], "data_offsets": [-4, 0]}}).encode()),
    "tensors that overlap": safetensors(
        json.dumps({name: {"dtype": "U8", "shape": [4], "data_offsets": [at, at + 4]} for name, at in (("a", 0), ("b", 3))}).encode(),
        bytes(7),
    ),
    "bytes that nobody owns": safetensors(b"{}", bytes(9)),
}


@pytest.mark.parametrize("what", SAFETENSORS_BOMBS)
def test_a_safetensors_file_that_claims_the_impossible_is_refused(tmp_path: Path, what: str) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(SAFETENSORS_BOMBS[what])
    fault(read_header, path)


NAMES = ["../model.safetensors", "/etc/model.safetensors", "a/../../model.safetensors", "", ".", "..", "model.bin", "\0.safetensors"]


@pytest.mark.parametrize("name", [*NAMES, "a\n.safetensors", "x" * 5000 + ".safetensors"], ids=range(len(NAMES) + 2))
def test_an_index_leads_to_no_file_outside_its_directory(tmp_path: Path, name: str) -> None:
    directory = write_directory(tmp_path / "m", shards=2)
    (directory / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    fault(read_tensors, directory)


def test_an_index_or_configuration_of_great_size_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "MAX_JSON_BYTES", 1000)
    directory = write_directory(tmp_path / "m", shards=2)
    for name, read in ((INDEX, read_tensors), ("config.json", read_config)):
        (directory / name).write_text("{" + " " * 1000 + "}")
        assert "too large" in fault(read, directory, named=directory / name)


damage = st.one_of(
    st.binary(min_size=1, max_size=4),
    st.sampled_from([struct.pack("<Q", number) for number in (0, 1, 1 << 31, 1 << 32, 1 << 40, 1 << 63, (1 << 64) - 1)]),
    st.sampled_from([struct.pack("<I", kind) for kind in range(13)]),
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.floats(0, 1), damage, st.booleans()), min_size=1, max_size=6))
def test_a_gguf_file_that_was_tampered_with_is_read_or_refused(tmp_path: Path, changes: list[tuple[float, bytes, bool]]) -> None:
    good = tmp_path / "good.gguf"
    content = bytearray((good if good.exists() else write_gguf(good)).read_bytes())
    for where, what, insert in changes:
        place = int(where * (len(content) - 8 * HIDDEN * 4))
        content[place : place if insert else place + len(what)] = what
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with little_and_soon():
        try:
            read_gguf(path)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)


pieces = st.sampled_from(
    [b"{", b"}", b"[", b"]", b'"', b",", b":", b"-", b"1e999", b"9" * 30, b"null", b"\\u0000", b"\xff", b'"shape"', b'"F64"', b""]
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.floats(0, 1), pieces, st.integers(0, 3)), min_size=1, max_size=6), st.booleans())
def test_a_safetensors_header_that_was_tampered_with_is_read_or_refused(
    tmp_path: Path, changes: list[tuple[float, bytes, int]], right_length: bool
) -> None:
    good = tmp_path / "m" / "model.safetensors"
    whole = (good if good.exists() else write_directory(good.parent) / good.name).read_bytes()
    length = int.from_bytes(whole[:8], "little")
    raw = bytearray(whole[8 : 8 + length])
    for where, what, lost in changes:
        place = int(where * len(raw))
        raw[place : place + lost] = what
    path = tmp_path / "bad.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw) if right_length else length) + raw + whole[8 + length :])
    with little_and_soon():
        try:
            read_header(path)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
