"""Families read what their files say, and refuse by name what is not built."""

import math
from typing import Any

import numpy as np
import pytest

from headrace.engine.checkpoint.card import FAMILIES
from headrace.engine.errors import UserError
from headrace.kernels.select import make_backend
from headrace.kernels.weights import Dense
from headrace.workers.model.config import RopeConfig
from headrace.workers.model.decoder import load_decoder
from headrace.workers.model.families import DESCRIBE, describe
from headrace.workers.model.names import HUGGINGFACE
from headrace.workers.model.rope import plain_frequencies, rope_table

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
GGUF: dict[str, Any] = {
    "general.architecture": "gemma3",
    "gemma3.block_count": 7,
    "gemma3.context_length": 128,
    "gemma3.embedding_length": 32,
    "gemma3.feed_forward_length": 48,
    "gemma3.attention.head_count": 4,
    "gemma3.attention.head_count_kv": [2, 2, 2],
    "gemma3.attention.key_length": 16,
    "gemma3.attention.layer_norm_rms_epsilon": 1e-6,
    "gemma3.attention.sliding_window": 12,
    "gemma3.rope.freq_base": 1e6,
}


class InMemory:
    """A checkpoint of a few tensors."""

    def __init__(self, format: str, metadata: dict[str, Any], tensors: dict[str, np.ndarray] | None = None) -> None:
        self.format, self.metadata, self.tensors = format, metadata, tensors or {"token_embd.weight": np.zeros((40, 32), np.float32)}

    def names(self) -> list[str]:
        return list(self.tensors)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def weight(self, name: str, rows: slice | None = None, columns: slice | None = None) -> Dense:
        return Dense(self.tensors[name])

    def vector(self, name: str, rows: slice | None = None) -> np.ndarray:
        return self.tensors[name]


def llama(**changes: Any) -> InMemory:
    return InMemory("huggingface", {**LLAMA, **changes})


def gemma(**changes: Any) -> InMemory:
    return InMemory("gguf", {**GGUF, **{key.replace("__", "."): value for key, value in changes.items()}})


def test_every_family_of_the_card_is_served():
    assert set(FAMILIES.values()) == set(DESCRIBE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "rope_type='longrope': supported rope scalings are"),
        ({"rope_scaling": {"type": "su"}}, "rope_type='su'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "lacks factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"hidden_act": "relu"}, "hidden_act='relu': supported activations are silu"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3: it must divide num_attention_heads=4"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_size": "many"}, "hidden_size='many': it must be a positive integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps=-1.0: it must be a positive number"),
    ],
)
def test_a_config_json_that_cannot_be_served_is_refused_by_name(changes, message):
    with pytest.raises(UserError, match=message):
        describe("LlamaForCausalLM", llama(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gemma3__final_logit_softcapping": 30.0}, "gemma3.final_logit_softcapping=30.0: this is not supported"),
        ({"gemma3__attention__head_count_kv": [1, 2]}, "layers of different sizes are not supported"),
        ({"gemma3__attention__value_length": 8}, "value_length=8: it must equal the key length 16"),
        ({"gemma3__rope__scaling__type": "longrope"}, "rope.scaling.type='longrope'"),
        ({"gemma3__block_count": None}, "lacks gemma3.block_count"),
    ],
)
def test_gguf_metadata_that_cannot_be_served_is_refused_by_name(changes, message):
    with pytest.raises(UserError, match=message):
        describe("gemma3", gemma(**changes))


def test_an_unknown_architecture_is_named_with_those_that_are_known():
    with pytest.raises(UserError, match='"mamba" is not supported: supported are LlamaForCausalLM'):
        describe("mamba", llama())


def test_gemma_layers_follow_the_pattern_their_file_gives():
    config, _ = describe("gemma3", gemma())
    assert [layer.window for layer in config.layers] == [12, 12, 12, 12, 12, None, 12]
    assert config.layers[0].rope.inverse_frequencies[1].item() == pytest.approx(10000 ** (-2 / 16))
    assert config.layers[5].rope.inverse_frequencies[1].item() == pytest.approx(1e6 ** (-2 / 16))
    config, _ = describe("gemma3", gemma(gemma3__attention__sliding_window_pattern=[True, False] * 3 + [True]))
    assert [layer.window for layer in config.layers] == [12, None, 12, None, 12, None, 12]
    config, _ = describe("gemma3", gemma(gemma3__attention__sliding_window=0))
    assert [layer.window for layer in config.layers] == [None] * 7


def test_only_the_largest_gemma_scales_its_scores_by_hidden_size_over_heads():
    assert describe("gemma3", gemma())[0].attention_scale == 16**-0.5
    assert describe("gemma3", gemma(gemma3__block_count=62))[0].attention_scale == 8**-0.5


def test_older_config_files_mean_the_same_as_newer_ones():
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    old, _ = describe("LlamaForCausalLM", llama(rope_theta=5e5, rope_scaling={"type": "llama3", **scaling}))
    new, _ = describe("LlamaForCausalLM", llama(rope_parameters={"rope_theta": 5e5, "rope_type": "llama3", **scaling}))
    assert np.array_equal(old.layers[0].rope.inverse_frequencies, new.layers[0].rope.inverse_frequencies)
    local = {"sliding_window": 9, "rope_local_base_freq": 1234.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    config, _ = describe("Gemma3ForCausalLM", llama(model_type="gemma3_text", hidden_activation="gelu_pytorch_tanh", head_dim=8, **local))
    assert np.array_equal(config.layers[0].rope.inverse_frequencies, plain_frequencies(1234.0, 8))


def test_mistral_has_a_window_unless_its_config_says_null():
    assert describe("MistralForCausalLM", llama(model_type="mistral"))[0].layers[0].window == 4096
    assert describe("MistralForCausalLM", llama(model_type="mistral", sliding_window=None))[0].layers[0].window is None
    assert describe("LlamaForCausalLM", llama(sliding_window=7))[0].layers[0].window is None


def test_a_missing_or_misshapen_tensor_is_named():
    backend = make_backend("reference")
    with pytest.raises(UserError, match=f"lacks tensor {HUGGINGFACE.embedding}"):
        load_decoder("LlamaForCausalLM", llama(), backend, context=16)
    misshapen = InMemory("huggingface", LLAMA, {HUGGINGFACE.embedding: np.zeros((39, 32), np.float32)})
    with pytest.raises(UserError, match=r"has shape \[39, 32\] where the model's metadata asks for \[40, 32\]"):
        load_decoder("LlamaForCausalLM", misshapen, backend, context=16)


def test_a_context_beyond_the_models_is_refused():
    with pytest.raises(UserError, match="a context of 129 tokens cannot be served: the model was made for 1 to 128"):
        load_decoder("LlamaForCausalLM", llama(), make_backend("reference"), context=129)


def test_the_rope_table_covers_the_served_context_and_no_more():
    rope = RopeConfig(plain_frequencies(10000.0, 8), interleaved=True, attention_factor=1.5)
    long, short = rope_table(rope, 200), rope_table(rope, 77)
    assert short.cos.shape == (77, 4)
    assert np.array_equal(long.cos[:77], short.cos)
    assert long.sin[130, 1].item() == pytest.approx(1.5 * math.sin(130 * 10000 ** (-2 / 8)), rel=1e-5)
