"""Tiny models in every quantized format give the logits that transformers gives for the values these formats define, on all kernels."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from headrace.kernels.select import make_backend
from headrace.workers.loader.safetensors import SafetensorsCheckpoint
from headrace.workers.model.decoder import load_decoder
from tests.workers.loader.quantized import FORMATS
from tests.workers.model.drive import KERNELS, Loaded, all_logits, load

SIZES: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
TEXT = torch.randint(3, 199, (40,), generator=torch.Generator().manual_seed(5)).tolist()


def build(name: str, directory: Path) -> torch.Tensor:
    """A model of random weights, stored in the format; its logits [len(TEXT), V] by transformers, in float32."""
    form, rng = FORMATS[name], np.random.default_rng(7)
    torch.manual_seed(7)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    tensors = {}
    for key, tensor in model.state_dict().items():
        if "_proj.weight" in key:
            stored, values = form.store(rng, *tensor.shape)
            tensor.copy_(torch.from_numpy(values))
            tensors |= {f"{key.removesuffix('.weight')}.{part}": one for part, one in stored.items()}
        else:
            tensors[key] = tensor.clone()
    safetensors.torch.save_file(tensors, directory / "model.safetensors")
    config = {**model.config.to_dict(), "architectures": ["LlamaForCausalLM"], "quantization_config": form.config}
    (directory / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        return model(torch.tensor([TEXT])).logits[0]


@pytest.mark.parametrize("name", FORMATS)
def test_a_quantized_model_gives_the_logits_of_its_values(name: str, tmp_path: Path) -> None:
    expected = build(name, tmp_path)
    for kernels in KERNELS:
        found = all_logits(load(kernels, "LlamaForCausalLM", SafetensorsCheckpoint(tmp_path), 64), TEXT)
        assert (found - expected).abs().max() < 2e-5 * expected.abs().max()


def build_experts(name: str, directory: Path) -> torch.Tensor:
    """The same of a mixture of experts, each of which is a layer of its own in the file."""
    form, rng = FORMATS[name], np.random.default_rng(7)
    torch.manual_seed(7)
    sizes = {**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "head_dim": 32, "norm_topk_prob": True}
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes)).eval()
    tensors = {}
    for key, tensor in model.state_dict().items():
        if ".experts." not in key:
            tensors[key] = tensor.clone()
            continue
        prefix, _, kind = key.rpartition(".")
        for expert, matrix in enumerate(tensor):
            for layer, part in zip(kind.removesuffix("_proj").split("_"), matrix.chunk(2 if kind == "gate_up_proj" else 1), strict=True):
                stored, values = form.store(rng, *part.shape)
                part.copy_(torch.from_numpy(values))
                tensors |= {f"{prefix}.{expert}.{layer}_proj.{name}": one for name, one in stored.items()}
    safetensors.torch.save_file(tensors, directory / "model.safetensors")
    config = {**model.config.to_dict(), "architectures": ["Qwen3MoeForCausalLM"], "quantization_config": form.config}
    (directory / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        return model(torch.tensor([TEXT])).logits[0]


@pytest.mark.parametrize("name", ["fp8-blocks", "awq", pytest.param("gptq-asym", marks=pytest.mark.slow), "float-tensor", "int-w8a8"])
def test_a_quantized_mixture_of_experts_gives_the_logits_of_its_values(name: str, tmp_path: Path) -> None:
    expected = build_experts(name, tmp_path)
    for kernels in KERNELS:
        found = all_logits(load(kernels, "Qwen3MoeForCausalLM", SafetensorsCheckpoint(tmp_path), 64), TEXT)
        assert (found - expected).abs().max() < 2e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["int-w8a8", "int-static", "float-channel", "fp8-blocks", "float-tensor", "gptq-asym", "awq"])
def test_inputs_rounded_as_the_format_asks_change_logits_a_little(name: str, tmp_path: Path) -> None:
    expected = build(name, tmp_path)
    for kernels in KERNELS:
        backend = make_backend(kernels, activations="auto")
        decoder = load_decoder("LlamaForCausalLM", SafetensorsCheckpoint(tmp_path), backend, 64)
        error = (all_logits(Loaded(backend, decoder), TEXT) - expected).norm() / expected.norm()
        # The native kernels take float8 as it is, and inputs beside it in float32, or bfloat16 where there are tiles for that.
        assert error < (0.15 if "float" in name or "fp8" in name or "static" in name else 0.06)
        if kernels == "reference":
            assert error > 1e-3
