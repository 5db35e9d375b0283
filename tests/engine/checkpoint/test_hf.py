"""A Hugging Face directory: configuration, headers, shards, and how damage is told."""

import json
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.engine.checkpoint.hf import DTYPE_BYTES, read_config, read_header, read_json, read_tensors
from headrace.engine.errors import UserError
from tests.engine.checkpoint.samples import write_directory


def header(entries: object, data: bytes = b"") -> bytes:
    raw = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def fault_of(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_tensors_lie_where_the_safetensors_package_finds_them(tmp_path: Path, shards: int) -> None:
    tensors = read_tensors(write_directory(tmp_path / "m", shards=shards))
    assert len({tensor.file for tensor in tensors.values()}) == shards
    assert set(tensors) == {"model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"}
    for name, tensor in tensors.items():
        expected = safetensors.numpy.load_file(tensor.file)[name]
        assert (tensor.shape, tensor.nbytes) == (expected.shape, expected.nbytes)
        assert tensor.file.read_bytes()[tensor.offset : tensor.offset + tensor.nbytes] == expected.tobytes()


def test_a_single_file_may_have_any_name(tmp_path: Path) -> None:
    directory = write_directory(tmp_path / "m")
    (directory / "model.safetensors").rename(directory / "weights.safetensors")
    assert len(read_tensors(directory)) == 3


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_a_multimodal_gemma_reads_as_its_text_model(tmp_path: Path, prefix: str) -> None:
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {"hidden_size": 77}, "eos_token_id": [1, 106]}
    directory = write_directory(tmp_path / "m", config=config, prefix=prefix)
    read = read_config(directory)
    assert read["architectures"] == ["Gemma3ForCausalLM"]
    assert (read["hidden_size"], read["eos_token_id"]) == (77, [1, 106])
    assert "model.embed_tokens.weight" in read_tensors(directory)
    assert not any("language_model" in name for name in read_tensors(directory))


def test_the_vision_part_of_a_multimodal_model_is_left_out(tmp_path: Path) -> None:
    tensors = {"language_model.lm_head.weight": np.ones((2, 2)), "vision_tower.x.weight": np.ones((2, 2))}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    assert set(read_tensors(tmp_path)) == {"lm_head.weight"}


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "claims 0 bytes"),
        (b"\x10", "claims 16 bytes and the file has 1"),
        (struct.pack("<Q", 1 << 62) + b"{}", "claims 4611686018427387904 bytes"),
        (header(b"{]"), "header is damaged"),
        (header(b"[" * 5000), "header is damaged"),
        (header(b'{"t":' + b"[" * 5000), "header is damaged"),
        (header(b'{"t":"\xff"}'), "header is damaged"),
        (header({"t": 5}), "header is damaged"),
        (header({"t": {"dtype": "F32", "shape": [1]}}, bytes(4)), "header is damaged"),
        (header({"t": entry("X9", [1], 0, 4)}, bytes(4)), "unknown type 'X9'"),
        (header({"t": entry("F32", [2], 0, 4)}, bytes(4)), "does not fit"),
        (header({"t": entry("F32", [-1], 0, -4)}), "does not fit"),
        (header({"t": entry("F32", [-1, -1], 0, 4)}, bytes(4)), "does not fit"),
        (header({"t": entry("F32", [1 << 60] * 1000, 0, 4)}, bytes(4)), "1000 dimensions"),
        (header({"t": entry("F32", [1], 0, 4), "u": entry("F32", [1], 0, 4)}, bytes(4)), "'u' starts at byte"),
        (header({"t": entry("F32", [1], 4, 8)}, bytes(8)), "'t' starts at byte"),
        (header({"t": entry("F32", [1], 0, 4)}, bytes(3)), "an unfinished download"),
        (header({"t": entry("F32", [1], 0, 4)}, bytes(5)), "its tensors end at byte"),
        (header({"a\nb": entry("F32", [2], 0, 4)}, bytes(4)), r"'a\nb'"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_a_damaged_safetensors_file_is_refused_in_one_line(tmp_path: Path, data: bytes, expected: str) -> None:
    assert expected in fault_of(tmp_path / "m.safetensors", data)


def test_every_type_has_its_size(tmp_path: Path) -> None:
    for dtype, size in DTYPE_BYTES.items():
        path = tmp_path / f"{dtype}.safetensors"
        path.write_bytes(header({"t": entry(dtype, [3], 0, 3 * size)}, bytes(3 * size)))
        assert read_header(path)["t"].nbytes == 3 * size


def test_faults_of_a_directory_are_told_with_the_way_out(tmp_path: Path) -> None:
    def fault(directory: Path) -> str:
        with pytest.raises(UserError) as caught:
            read_config(directory)
            read_tensors(directory)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    directory = write_directory(tmp_path / "m", shards=2)
    index = directory / "model.safetensors.index.json"
    original = index.read_text()
    first, second = sorted(directory.glob("*.safetensors"))

    second.rename(tmp_path / "away")
    assert "lacks the file 'model-00002-of-00002.safetensors'" in fault(directory)
    (tmp_path / "away").rename(second)
    index.write_text(original.replace('"model.norm.weight"', '"model.other.weight"'))
    assert "'model.other.weight', but it does not" in fault(directory)
    index.write_text(original.replace(second.name, "../" + second.name))
    assert "no safetensors file of this directory" in fault(directory)
    index.write_text("{}")
    assert "not a safetensors index" in fault(directory)
    index.write_text(original)
    second.write_bytes(first.read_bytes())
    assert "which another file has too" in fault(directory)
    index.unlink()
    assert "2 safetensors files but no model.safetensors.index.json" in fault(directory)
    first.unlink()
    second.unlink()
    assert "the weights are missing" in fault(directory)
    (directory / "q.gguf").touch()
    assert "it holds q.gguf" in fault(directory)
    (directory / "pytorch_model.bin").touch()
    assert "pickled weights (pytorch_model.bin)" in fault(directory)
    (directory / "config.json").write_text("[1]")
    assert "should hold a JSON object" in fault(directory)
    (directory / "config.json").write_text("{")
    assert "not valid JSON" in fault(directory)
    (directory / "config.json").write_text('{"a":' + "[" * 100_000)
    assert "not valid JSON" in fault(directory)
    (directory / "config.json").unlink()
    assert "has no config.json" in fault(directory)


def test_a_huge_json_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(65 << 20)
    with pytest.raises(UserError, match="too large"):
        read_json(path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_random_damage_to_a_header_is_a_user_error_or_harmless(tmp_path: Path, data: st.DataObject) -> None:
    good = tmp_path / "m" / "model.safetensors"
    if not good.exists():
        write_directory(good.parent)
    content = bytearray(good.read_bytes())
    head = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(0, 3))):
        place = data.draw(st.integers(0, head - 1))
        damage = data.draw(st.one_of(st.binary(min_size=1, max_size=1), st.sampled_from([b"9", b'"', b"-", b"[", b"\xff", b"\\"])))
        content[place : place + 1] = damage
    cut = data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content[:cut])
    tracemalloc.start()
    try:
        read_header(path)
    except UserError as error:
        assert "\n" not in str(error)
        assert str(path) in str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 4 << 20
