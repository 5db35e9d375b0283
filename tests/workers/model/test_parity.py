"""Tiny models of every family give transformers' logits at every position and its greedy tokens: on all kernels, from both formats."""

from collections.abc import Collection, Iterable

import pytest
import torch

from headrace.workers.loader.gguf import GGUFCheckpoint
from headrace.workers.loader.safetensors import SafetensorsCheckpoint
from tests.workers.model.drive import KERNELS, Loaded, all_logits, greedy, load
from tests.workers.model.tiny import MODELS, build, write_gguf

CLOSE = 1e-4
"""The project asks for 1e-3."""

TEXT = torch.randint(3, 199, (170,), generator=torch.Generator().manual_seed(5)).tolist()
"""Longer than every sliding window and than one split of the attention."""

WITHOUT_GGUF = ("llama-dynamic-rope", "qwen2-window-above-layer-1", "gemma3", "qwen3-moe-with-window", "qwen3-moe-in-some-layers")
IN_GGUF = [name for name in MODELS if name not in WITHOUT_GGUF]
"""The others have no words in a GGUF file for what their config.json says."""


def each(names: Iterable[str], short: Collection[str] = ()) -> list:
    """Every name with all kernels: those of models with experts on the reference in the long tier, where they are not in `short`."""
    pairs = [(name, kernels) for name in names for kernels in KERNELS]
    long = [pair for pair in pairs if pair[0].startswith(("qwen3-moe", "mixtral")) and pair[1] == "reference" and pair[0] not in short]
    return [pytest.param(*pair, marks=pytest.mark.slow if pair in long else ()) for pair in pairs]


def assert_equal_to(model, loaded: Loaded) -> None:
    with torch.no_grad():
        expected = model(torch.tensor([TEXT])).logits[0]
    difference = (all_logits(loaded, TEXT) - expected).abs().max().item()
    assert difference < CLOSE, f"logits differ by {difference:.2e} of {expected.abs().max().item():.1f}"
    continued = greedy(loaded, TEXT[:20], 128)
    # each token is the oracle's choice after the same tokens: so, one by one, its own continuation
    with torch.no_grad():
        chosen = model(torch.tensor([TEXT[:20] + continued])).logits[0].argmax(-1)
    assert continued == chosen[19:-1].tolist()


@pytest.mark.parametrize(("name", "kernels"), each(MODELS, short=["qwen3-moe"]))
def test_a_hugging_face_directory_gives_the_same_logits_and_greedy_tokens(name, kernels, tmp_path):
    model = build(name, tmp_path)
    architecture = model.config.architectures[0]
    loaded = load(kernels, architecture, SafetensorsCheckpoint(tmp_path), 256)
    assert_equal_to(model, loaded)


@pytest.mark.parametrize(("name", "kernels"), each(IN_GGUF))
def test_a_gguf_file_gives_the_same_logits_and_greedy_tokens(name, kernels, tmp_path):
    model = build(name, tmp_path)
    architecture = write_gguf(model, tmp_path / "model.gguf")
    loaded = load(kernels, architecture, GGUFCheckpoint(tmp_path / "model.gguf"), 256)
    assert_equal_to(model, loaded)


@pytest.mark.parametrize("name", ["qwen3-moe", "mixtral"])
def test_experts_in_one_tensor_give_the_same(name, tmp_path):
    model = build(name, tmp_path, as_published=False)
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert checkpoint.shape("model.layers.0.mlp.experts.down_proj")[0] == model.config.num_local_experts
    assert_equal_to(model, load("cpu", model.config.architectures[0], checkpoint, 256))
