"""Random models have weights of the wanted size, and load."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import random_model

from headrace.engine.checkpoint.resolve import resolve
from headrace.engine.config import Config
from headrace.workers.loader import open_checkpoint
from tests.workers.model.drive import all_logits, load

SHAPE = random_model.Shape(layers=2, hidden=256, heads=4, kv_heads=2, mlp=512, context=128)
TOKENS = 300


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([chr(0x100 + number) for number in range(TOKENS)])
    writer.add_token_types([gguf.TokenType.NORMAL] * TOKENS)
    writer.add_token_merges([])
    writer.add_eos_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("form", ["q8_0", "q4_k"])
def test_matrices_are_centred_and_scaled_by_their_inputs(form: str) -> None:
    kind = random_model.FORMATS[form][0]
    rows = random_model.matrix(np.random.default_rng(0), form, 256, 1024, 1 / np.sqrt(1024))
    values = gguf.dequantize(rows, kind)
    assert values.shape == (256, 1024)
    assert values.std() * np.sqrt(1024) == pytest.approx(1, abs=0.05)
    assert abs(values.mean()) < 0.02 * values.std()
    # Codes and scales alike are spread over their whole range, in every place of a block.
    assert np.abs(values.reshape(256, -1, 256).std((0, 1)) / values.std() - 1).max() < 0.25


@pytest.mark.parametrize("form", ["q8_0", "q4_k"])
def test_a_random_model_loads_and_its_logits_are_of_ordinary_size(form: str, tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / "random.gguf"
    weights = random_model.write(tokenizer, path, form, SHAPE, 0)
    assert weights == TOKENS * 256 + 2 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 512 * 256)
    files = resolve(Config(model=str(path)))
    loaded = load("reference", files.architecture, open_checkpoint(files), 64)
    logits = all_logits(loaded, list(range(1, 40)))
    assert 0.3 < logits.std() < 3


def test_a_random_model_carries_the_tokenizer_it_was_given(tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / "random.gguf"
    random_model.write(tokenizer, path, "q8_0", SHAPE, 0)
    given, taken = gguf.GGUFReader(tokenizer).fields, gguf.GGUFReader(path).fields
    names = [name for name in given if name.startswith("tokenizer.")]
    assert len(names) >= 4
    assert all(taken[name].contents() == given[name].contents() for name in names)
