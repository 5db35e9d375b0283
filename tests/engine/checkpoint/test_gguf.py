"""The GGUF container: what is read, and how damage is told."""

import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.engine.checkpoint.gguf import GGML_TYPES, GGUFFile
from headrace.engine.checkpoint.resolve import find_default
from headrace.engine.errors import UserError
from tests.engine.checkpoint.samples import HIDDEN, TYPES, VOCABULARY, write_gguf


def fault_of(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        GGUFFile(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def header(values: bytes = b"", value_count: int = 0, tensors: bytes = b"", tensor_count: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensor_count, value_count) + values + tensors


def entry(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def test_metadata_and_tensors_are_those_that_were_written(tmp_path: Path) -> None:
    file = GGUFFile(write_gguf(tmp_path / "m.gguf"))
    assert file.version == 3
    assert file.metadata["general.architecture"] == "llama"
    assert file.metadata["llama.context_length"] == 512
    assert file.metadata["test.flag"] is True
    assert file.metadata["test.nested"] == [[1, 2], [3, 4]]
    assert file.metadata["tokenizer.ggml.tokens"] == VOCABULARY
    assert file.metadata["tokenizer.ggml.token_type"] == TYPES
    assert file.metadata["tokenizer.ggml.scores"] == [0.5] * len(VOCABULARY)
    assert file.metadata.get("absent") is None
    embedding = file.tensors["token_embd.weight"]
    assert (embedding.shape, embedding.type, embedding.nbytes) == ((8, HIDDEN), "F32", 8 * HIDDEN * 4)
    assert np.array_equal(np.frombuffer(file.tensor_bytes("token_embd.weight"), np.float32), np.arange(8 * HIDDEN))


def test_an_array_is_counted_without_being_decoded(tmp_path: Path) -> None:
    metadata = GGUFFile(write_gguf(tmp_path / "m.gguf")).metadata
    assert metadata.length("tokenizer.ggml.tokens") == len(VOCABULARY)
    assert len(metadata["tokenizer.ggml.tokens"]) == metadata.length("tokenizer.ggml.tokens")
    with pytest.raises(KeyError):
        metadata.length("general.architecture")


def test_the_default_model_reads_as_its_publisher_wrote_it() -> None:
    file = GGUFFile(find_default())
    assert len(file.metadata["tokenizer.ggml.tokens"]) == 49_152
    assert file.metadata["tokenizer.ggml.tokens"][:3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert len(file.metadata["tokenizer.ggml.merges"]) == 48_900
    assert file.metadata["llama.rope.freq_base"] == 100_000.0
    assert file.metadata["tokenizer.chat_template"].startswith("{% for message in messages %}")
    kinds = [tensor.type for tensor in file.tensors.values()]
    assert (len(kinds), kinds.count("Q4_1"), kinds.count("Q8_0"), kinds.count("F32")) == (272, 210, 1, 61)


def test_the_table_of_tensor_types_is_that_of_ggml() -> None:
    known = {kind.value: (kind.name, *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType}
    assert known == GGML_TYPES


def test_version_2_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(header(version=2))
    assert GGUFFile(path).version == 2


def test_text_with_a_stray_byte_is_read_with_a_replacement(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    bad = struct.pack("<Q", 3) + b"a\xffb"
    path.write_bytes(header(string("k") + struct.pack("<I", 8) + bad + string("a") + struct.pack("<IIQ", 9, 8, 1) + bad, 2))
    metadata = GGUFFile(path).metadata
    assert metadata["k"] == "a\ufffdb"
    assert metadata["a"] == ["a\ufffdb"]


def test_a_file_that_is_no_gguf_says_so(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    assert "has only 0 bytes" in fault_of(path, b"")
    assert "starts with b'PK" in fault_of(path, b"PK\x03\x04" + bytes(100))
    assert "version 1" in fault_of(path, header(version=1))
    assert "big-endian" in fault_of(path, b"GGUF" + struct.pack(">IQQ", 3, 0, 0))
    with pytest.raises(UserError, match="No such file"):
        GGUFFile(tmp_path / "absent.gguf")
    with pytest.raises(UserError, match="Is a directory"):
        GGUFFile(tmp_path)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (header(value_count=1 << 62), "ends within a metadata key"),
        (header(tensor_count=1 << 62), "claims 4611686018427387904 tensors"),
        (header(struct.pack("<Q", 1 << 60), 1), "claims 1152921504606846976 bytes"),
        (header(struct.pack("<Q", 2) + b"\xff\xff" + bytes(20), 1), "not UTF-8"),
        (header(string("k") + struct.pack("<IQ", 8, 1 << 63), 1), "ends within the metadata value 'k'"),
        (header(string("k") + struct.pack("<I", 99), 1), "unknown type 99"),
        (header(string("k") + struct.pack("<IIQ", 9, 99, 1), 1), "array of the unknown type 99"),
        (header(string("k") + struct.pack("<IIQ", 9, 5, 1 << 61), 1), "ends within the metadata value 'k'"),
        (header(string("k") + struct.pack("<IIQ", 9, 8, 1 << 40), 1), "claims 1099511627776 elements"),
        (header(string("k") + struct.pack("<IIQQ", 9, 8, 1, 1 << 63) + bytes(64), 1), "ends within the metadata value 'k'"),
        (header(string("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 50 + bytes(64), 1), "nests arrays more than 4 deep"),
        (header((string("k") + struct.pack("<IB", 0, 1)) * 2, 2), "metadata key 'k' twice"),
        (header(string("general.alignment") + struct.pack("<II", 4, 0), 1), "general.alignment is 0"),
        (header(string("general.alignment") + struct.pack("<II", 4, 33), 1), "general.alignment is 33"),
        (header(string("general.alignment") + struct.pack("<I", 8) + string("x"), 1), "general.alignment is 'x'"),
        (header(tensors=entry("t", (1,) * 5) + bytes(99), tensor_count=1), "5 dimensions"),
        (header(tensors=entry("t", ()) + bytes(99), tensor_count=1), "0 dimensions"),
        (header(tensors=entry("t", (0,)) + bytes(99), tensor_count=1), "shape [0]"),
        (header(tensors=entry("t", (31,), 3) + bytes(99), tensor_count=1), "multiples of 32 for Q4_1"),
        (header(tensors=entry("t", (4,), 77) + bytes(99), tensor_count=1), "type number 77"),
        (header(tensors=entry("t", (1 << 62, 1 << 62)) + bytes(99), tensor_count=1), "should end at byte"),
        (header(tensors=entry("t", (4,), 0, 1 << 63) + bytes(99), tensor_count=1), "should end at byte"),
        (header(tensors=entry("t", (4,), 0, 7) + bytes(99), tensor_count=1), "not a multiple of the alignment 32"),
        (header(tensors=entry("t", (4,)) * 2 + bytes(99), tensor_count=2), "tensor 't' twice"),
        (header(tensors=entry("t", (9,)) + entry("u", (4,), 0, 32) + bytes(199), tensor_count=2), "tensors 't' and 'u' overlap"),
        (header(tensors=entry("a\nb", (1 << 40,)) + bytes(99), tensor_count=1), r"'a\nb'"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line_that_names_the_fault(tmp_path: Path, data: bytes, expected: str) -> None:
    assert expected in fault_of(tmp_path / "m.gguf", data)


def test_an_unfinished_download_is_recognized(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    assert "an unfinished download" in fault_of(path, path.read_bytes()[:-200])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_random_damage_is_a_user_error_or_harmless_and_allocates_little(tmp_path: Path, data: st.DataObject) -> None:
    good = tmp_path / "good.gguf"
    if not good.exists():
        write_gguf(good)
    content = bytearray(good.read_bytes())
    head = len(content) - 8 * HIDDEN * 4
    for _ in range(data.draw(st.integers(0, 4))):
        place = data.draw(st.integers(0, head - 8))
        damage = data.draw(st.one_of(st.binary(min_size=1, max_size=1), st.sampled_from([b"\xff" * 8, bytes(8), b"\xff\xff\xff\x7f"])))
        content[place : place + len(damage)] = damage
    cut = data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))
    path = tmp_path / "bad.gguf"
    path.write_bytes(content[:cut])
    tracemalloc.start()
    try:
        file = GGUFFile(path)
        for key in file.metadata:
            file.metadata[key]
        for name, tensor in file.tensors.items():
            assert len(file.tensor_bytes(name)) == tensor.nbytes
    except UserError as error:
        assert "\n" not in str(error)
        assert str(path) in str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 4 << 20
