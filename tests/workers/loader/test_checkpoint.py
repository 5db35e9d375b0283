"""Checkpoints as the model builder sees them, of both formats."""

import warnings
from pathlib import Path

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch

from headrace.engine.checkpoint.resolve import resolve
from headrace.engine.config import Config
from headrace.engine.errors import UserError
from headrace.kernels.weights import Dense, GroupedInt
from headrace.workers.loader import Checkpoint, open_checkpoint
from tests.engine.checkpoint.samples import HIDDEN, write_directory, write_gguf

EMBEDDING = np.arange(8 * HIDDEN, dtype=np.float32).reshape(8, HIDDEN)


def opened(path: Path) -> Checkpoint:
    return open_checkpoint(resolve(Config(model=str(path))))


def whole_gguf(path: Path) -> Checkpoint:
    """One tensor of every kind of storage."""
    rng = np.random.default_rng(5)
    reals = rng.standard_normal((6, 256)).astype(np.float32)
    kinds = gguf.GGMLQuantizationType
    tensors = {
        "token_embd.weight": (EMBEDDING, None),
        "half.weight": (reals.astype(np.float16), None),
        "brain.weight": (gguf.quants.quantize(reals, kinds.BF16), kinds.BF16),
        "q8.weight": (gguf.quants.quantize(reals, kinds.Q8_0), kinds.Q8_0),
        "q4k.weight": (rng.integers(0, 50, (6, 144), np.uint8), kinds.Q4_K),
        "norm.weight": (reals[0], None),
        "half.bias": (reals[0].astype(np.float16), None),
        "cube.weight": (np.zeros((2, 2, 2), np.float32), None),
    }
    return opened(write_gguf(path, tensors=tensors))


def fault(call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_gguf_gives_floats_as_they_are_and_blocks_as_grouped_integers(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint = whole_gguf(tmp_path / "m.gguf")
        assert checkpoint.format == "gguf"
        assert checkpoint.metadata["general.architecture"] == "llama"
        assert "norm.weight" in checkpoint
        assert "absent" not in checkpoint
        assert checkpoint.names()[0] == "token_embd.weight"
        assert checkpoint.shape("q4k.weight") == (6, 256)
        embedding = checkpoint.weight("token_embd.weight")
        assert isinstance(embedding, Dense)
        assert np.array_equal(embedding.values, EMBEDDING)
        for name, dtype in (("half.weight", "float16"), ("brain.weight", "bfloat16")):
            weight = checkpoint.weight(name)
            assert isinstance(weight, Dense)
            assert (weight.dtype, weight.shape) == (dtype, (6, 256))
        q8 = checkpoint.weight("q8.weight")
        assert isinstance(q8, GroupedInt)
        assert np.allclose(q8.dequantize(), checkpoint.weight("half.weight").dequantize(), atol=0.03)
        assert checkpoint.vector("half.bias").dtype == np.float32
        assert np.array_equal(checkpoint.vector("half.bias"), checkpoint.vector("norm.weight").astype(np.float16).astype(np.float32))
        assert np.array_equal(checkpoint.vector("norm.weight", slice(3, 9)), checkpoint.vector("norm.weight")[3:9])


@pytest.mark.parametrize("name", ["token_embd.weight", "half.weight", "q8.weight", "q4k.weight"])
def test_a_ranks_part_equals_the_part_of_the_whole(tmp_path: Path, name: str) -> None:
    checkpoint = whole_gguf(tmp_path / "m.gguf")
    rows, columns = slice(1, 4), slice(32, 64)
    whole = checkpoint.weight(name).dequantize()
    assert np.array_equal(checkpoint.weight(name, rows=rows).dequantize(), whole[rows])
    assert np.array_equal(checkpoint.weight(name, columns=columns).dequantize(), whole[:, columns])
    assert np.array_equal(checkpoint.weight(name, rows, columns).dequantize(), whole[rows, columns])


def test_a_gguf_tells_what_cannot_be_given(tmp_path: Path) -> None:
    checkpoint = whole_gguf(tmp_path / "m.gguf")
    assert "no tensor 'absent'" in fault(lambda: checkpoint.weight("absent"))
    assert "[2, 2, 2] where a matrix is expected" in fault(lambda: checkpoint.weight("cube.weight"))
    assert "where a vector is expected" in fault(lambda: checkpoint.vector("q8.weight"))
    assert "'q4k.weight' cannot be cut there" in fault(lambda: checkpoint.weight("q4k.weight", columns=slice(0, 100)))


@pytest.mark.parametrize("shards", [1, 2])
def test_a_directory_gives_what_the_safetensors_package_reads(tmp_path: Path, shards: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        directory = write_directory(tmp_path / "m", shards=shards)
        checkpoint = opened(directory)
        assert checkpoint.format == "huggingface"
        assert checkpoint.metadata["architectures"] == ["LlamaForCausalLM"]
        expected: dict[str, torch.Tensor] = {}
        for file in directory.glob("*.safetensors"):
            expected |= safetensors.torch.load_file(file)
        assert set(checkpoint.names()) == set(expected)
        for name, tensor in expected.items():
            assert checkpoint.shape(name) == tuple(tensor.shape)
            if tensor.dim() == 1:
                assert np.array_equal(checkpoint.vector(name), tensor.float().numpy())
            else:
                weight = checkpoint.weight(name, slice(2, 7), slice(1, 9))
                assert isinstance(weight, Dense)
                assert f"torch.{weight.dtype}" == str(tensor.dtype)
                assert np.array_equal(weight.dequantize(), tensor[2:7, 1:9].float().numpy())


def test_a_tensor_at_an_odd_place_is_read_all_the_same(tmp_path: Path) -> None:
    directory = write_directory(tmp_path / "m")
    raw = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"model.embed_tokens.weight":'
    raw += b'{"dtype":"F32","shape":[2,2],"data_offsets":[1,17]}}'
    values = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    data = len(raw).to_bytes(8, "little") + raw + b"x" + values.tobytes()
    (directory / "model.safetensors").write_bytes(data)
    assert np.array_equal(opened(directory).weight("model.embed_tokens.weight").dequantize(), values)


def test_a_directory_tells_what_cannot_be_given(tmp_path: Path) -> None:
    directory = write_directory(tmp_path / "m")
    tensors = safetensors.torch.load_file(directory / "model.safetensors")
    safetensors.torch.save_file({**tensors, "x": torch.ones(2, 2, dtype=torch.int64)}, directory / "model.safetensors")
    checkpoint = opened(directory)
    assert "no tensor 'absent'" in fault(lambda: checkpoint.vector("absent"))
    assert "the type I64: F32, F16, BF16 can be read" in fault(lambda: checkpoint.weight("x"))
    assert "where a vector is expected" in fault(lambda: checkpoint.vector("model.embed_tokens.weight"))
    assert "where a matrix is expected" in fault(lambda: checkpoint.weight("model.norm.weight"))


def test_floats_stay_in_the_mapped_file(tmp_path: Path) -> None:
    """Asking for a dense weight must not copy it: two requests give the same memory."""
    for path, name in (
        (write_directory(tmp_path / "d"), "model.embed_tokens.weight"),
        (write_gguf(tmp_path / "m.gguf"), "token_embd.weight"),
    ):
        checkpoint = opened(path)
        first, second = checkpoint.weight(name), checkpoint.weight(name, slice(1, None))
        assert isinstance(first, Dense)
        assert isinstance(second, Dense)
        assert second.values.ctypes.data == first.values[1:].ctypes.data


def test_a_view_outlives_its_checkpoint(tmp_path: Path) -> None:
    view = opened(write_gguf(tmp_path / "m.gguf")).weight("token_embd.weight")
    assert np.array_equal(view.dequantize(), EMBEDDING)


def test_the_default_model_opens_with_every_tensor_in_canonical_form() -> None:
    checkpoint = open_checkpoint(resolve(Config()))
    embedding = checkpoint.weight("token_embd.weight", slice(0, 4))
    assert isinstance(embedding, GroupedInt)
    assert (embedding.shape, embedding.bits) == ((4, 576), 8)
    down = checkpoint.weight("blk.29.ffn_down.weight")
    assert isinstance(down, GroupedInt)
    assert (down.shape, down.bits, down.group) == ((576, 1536), 4, 32)
    assert checkpoint.vector("output_norm.weight").shape == (576,)
