"""Families read what their files say, and refuse by name what is not built."""

import math
from typing import Any

import numpy as np
import pytest

from headrace.engine.checkpoint.card import FAMILIES
from headrace.engine.errors import UserError
from headrace.kernels.select import make_backend
from headrace.kernels.weights import Dense
from headrace.workers.model.config import ExpertsConfig, RopeConfig
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

    def experts(self, name: str) -> list[Dense]:
        return [Dense(matrix) for matrix in self.tensors[name]]

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


QWEN3_MOE: dict[str, Any] = {
    **LLAMA,
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 6,
}
GGUF_MOE: dict[str, Any] = {
    **{key.replace("gemma3", "qwen3moe"): value for key, value in GGUF.items()},
    "general.architecture": "qwen3moe",
    "qwen3moe.expert_count": 4,
    "qwen3moe.expert_used_count": 2,
    "qwen3moe.expert_feed_forward_length": 24,
    "qwen3moe.attention.head_count_kv": 2,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 5}, "num_experts_per_tok=5: there are 4 experts"),
        ({"n_shared_experts": 1}, "n_shared_experts=1: this is not supported"),
        ({"scoring_func": "sigmoid"}, "scoring_func='sigmoid': experts are chosen by"),
        ({"topk_group": 4}, "topk_group=4: this is not supported"),
        ({"num_experts": "many"}, "num_experts='many': it must be a positive integer"),
    ],
)
def test_experts_that_cannot_be_served_are_refused_by_name(changes, message):
    for architecture in ("Qwen3MoeForCausalLM", "MixtralForCausalLM"):
        metadata = {key.replace("num_experts", "num_local_experts"): value for key, value in {**QWEN3_MOE, **changes}.items()}
        metadata["num_experts_per_tok"] = metadata.pop("num_local_experts_per_tok")
        qwen = architecture == "Qwen3MoeForCausalLM"
        with pytest.raises(UserError, match=message if qwen else message.replace("num_experts=", "num_local_experts=")):
            describe(architecture, InMemory("huggingface", {**QWEN3_MOE, **changes} if qwen else metadata))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_used_count": 9}, "qwen3moe.expert_used_count=9: there are 4 experts"),
        ({"expert_shared_count": 1}, "qwen3moe.expert_shared_count=1: this is not supported"),
        ({"expert_gating_func": 2}, "qwen3moe.expert_gating_func=2: experts are chosen by a softmax"),
        ({"expert_weights_scale": 2.5}, "qwen3moe.expert_weights_scale=2.5: this is not supported"),
    ],
)
def test_experts_of_gguf_files_that_cannot_be_served_are_refused_by_name(changes, message):
    with pytest.raises(UserError, match=message):
        describe("qwen3moe", InMemory("gguf", {**GGUF_MOE, **{f"qwen3moe.{key}": value for key, value in changes.items()}}))


def test_layers_have_experts_where_their_config_says_so():
    def layers(**changes: Any) -> list[bool]:
        config, _ = describe("Qwen3MoeForCausalLM", InMemory("huggingface", {**QWEN3_MOE, **changes}))
        return [layer.experts is not None for layer in config.layers]

    assert layers() == [True] * 6
    assert layers(decoder_sparse_step=2) == [False, True] * 3
    assert layers(decoder_sparse_step=3, mlp_only_layers=[2]) == [False, False, False, False, False, True]
    renamed = {key: value for key, value in QWEN3_MOE.items() if key != "num_experts"}
    config, _ = describe("Qwen3MoeForCausalLM", InMemory("huggingface", {**renamed, "num_local_experts": 5, "norm_topk_prob": True}))
    assert config.layers[0].experts == ExpertsConfig(count=5, used=2, mlp=24, renormalize=True)


def test_an_older_gguf_file_has_a_tensor_for_each_expert():
    embedding = {"token_embd.weight": np.zeros((40, 32), np.float32)}
    router = {f"blk.{layer}.ffn_gate_inp.weight": np.zeros((4, 32), np.float32) for layer in range(7)}
    _, names = describe("qwen3moe", InMemory("gguf", GGUF_MOE, {**embedding, **router}))
    assert names.expert_down == "blk.{}.ffn_down_exps.weight"
    down = {"blk.3.ffn_down.0.weight": np.zeros((32, 24), np.float32)}
    config, names = describe("qwen3moe", InMemory("gguf", GGUF_MOE, {**embedding, **router, **down}))
    assert names.expert_down == "blk.{}.ffn_down.{}.weight"
    assert config.layers[6].experts == ExpertsConfig(count=4, used=2, mlp=24, renormalize=True)


def test_a_missing_or_misshapen_expert_is_named():
    config = {**QWEN3_MOE, "num_hidden_layers": 1, "tie_word_embeddings": True, "head_dim": 8}
    norms = {f"model.layers.0.{name}.weight": (32,) for name in ("input_layernorm", "post_attention_layernorm")}
    norms |= {"model.norm.weight": (32,), **{f"model.layers.0.self_attn.{name}_norm.weight": (8,) for name in "qk"}}
    matrices = {"q": (32, 32), "k": (16, 32), "v": (16, 32), "o": (32, 32)}
    shapes = {"model.embed_tokens.weight": (40, 32), "model.layers.0.mlp.gate.weight": (4, 32), **norms}
    shapes |= {f"model.layers.0.self_attn.{name}_proj.weight": shape for name, shape in matrices.items()}
    for expert in range(4):
        names = {"gate": (24, 32), "up": (24, 32), "down": (32, 24)}
        shapes |= {f"model.layers.0.mlp.experts.{expert}.{name}_proj.weight": shape for name, shape in names.items()}
    tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    backend = make_backend("reference")
    assert load_decoder("Qwen3MoeForCausalLM", InMemory("huggingface", config, tensors), backend, context=16).layers[0].experts
    name = "model.layers.0.mlp.experts.2.up_proj.weight"
    with pytest.raises(UserError, match=rf"{name} has shape \[24, 31\] where the model's metadata asks for \[24, 32\]"):
        load_decoder(
            "Qwen3MoeForCausalLM", InMemory("huggingface", config, {**tensors, name: np.zeros((24, 31), np.float32)}), backend, context=16
        )
    del tensors[name]
    with pytest.raises(UserError, match=f"lacks tensor {name}"):
        load_decoder("Qwen3MoeForCausalLM", InMemory("huggingface", config, tensors), backend, context=16)


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
