"""Quantized layers as Hugging Face checkpoints store them, written value by value from what the formats say.

    FORMATS[name].store(rng, N, K) ──▶ the layer's tensors (torch, under the names beside its own), and its values in float32 [N, K]

Every format that can be read is here, in every variant. Values are those of the definition: (code - zero) * scale, rounded once.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

Tensors = dict[str, torch.Tensor]
Stored = tuple[Tensors, np.ndarray]


@dataclass(frozen=True)
class Format:
    config: dict[str, Any]
    """What stands in quantization_config."""
    store: Callable[[np.random.Generator, int, int], Stored]


def packed(fields: np.ndarray, bits: int) -> torch.Tensor:
    """Fields [M, L] as int32 [M, ceil(L * bits / 32)]: those of a row that follow each other in a word, the first in its lowest bits."""
    each = 32 // bits
    words = np.zeros((len(fields), -(-fields.shape[1] // each)), np.uint32)
    for place in range(fields.shape[1]):
        words[:, place // each] |= fields[:, place].astype(np.uint32) << np.uint32(bits * (place % each))
    return torch.from_numpy(words.view(np.int32))


def spread(scales: np.ndarray, block: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    """What holds for blocks, for each place [N, K]."""
    n, k = np.indices(shape)
    return scales[n // block[0], k // block[1]]


def draw_scales(rng: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype, bits: int = 2) -> torch.Tensor:
    """Such that codes of so many bits become weights of an ordinary size."""
    return torch.from_numpy(rng.uniform(0.5, 2.0, shape).astype(np.float32) / (4 << bits)).to(dtype)


def scaled(block: tuple[int | None, int | None], name: str, dtype: torch.dtype, inputs: str = "", bits: int = 0, zeros: bool = False):
    """Codes of float8, or of int8 where `bits` says so."""

    def store(rng: np.random.Generator, n: int, k: int) -> Stored:
        size = (block[0] or n, block[1] or k)
        scales = draw_scales(rng, (-(-n // size[0]), -(-k // size[1])), dtype, bits or 2)
        tensors = {name: scales.reshape(1) if scales.numel() == 1 else scales}
        if bits:
            codes = rng.integers(-(1 << bits - 1), 1 << bits - 1, (n, k)).astype(np.int8)
            values = codes.astype(np.float32)
            tensors["weight"] = torch.from_numpy(codes)
        else:
            drawn = torch.from_numpy(rng.standard_normal((n, k)).astype(np.float32)).to(torch.float8_e4m3fn)
            tensors["weight"], values = drawn, drawn.float().numpy()
        if zeros:
            points = rng.integers(-9, 9, tuple(scales.shape)).astype(np.int8)
            tensors["weight_zero_point"] = torch.from_numpy(points)
            values = values - spread(points, size, (n, k))
        if inputs:
            tensors[inputs] = torch.tensor(0.0625)
        return tensors, values * spread(scales.float().numpy(), size, (n, k))

    return store


def bitsandbytes(rng: np.random.Generator, n: int, k: int) -> Stored:
    codes, most = rng.integers(-127, 128, (n, k)).astype(np.int8), rng.uniform(0.1, 0.4, n).astype(np.float32)
    tensors = {"weight": torch.from_numpy(codes), "SCB": torch.from_numpy(most), "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return tensors, codes * (most / np.float32(127))[:, None]


def pack_quantized(bits: int, group: int | None, zeros: bool, dtype: torch.dtype = torch.bfloat16):
    def store(rng: np.random.Generator, n: int, k: int) -> Stored:
        size, low = group or k, 1 << bits - 1
        codes, scales = rng.integers(-low, low, (n, k)), draw_scales(rng, (n, k // size), dtype, bits)
        points = rng.integers(-low, low, (n, k // size)) if zeros else np.zeros((n, k // size), np.int64)
        tensors = {"weight_packed": packed(codes + low, bits), "weight_scale": scales, "weight_shape": torch.tensor([n, k])}
        if zeros:
            tensors["weight_zero_point"] = packed((points + low).T, bits).T.contiguous()
        places = spread(points, (1, size), (n, k)), spread(scales.float().numpy(), (1, size), (n, k))
        return tensors, (codes - places[0]).astype(np.float32) * places[1]

    return store


def gptq(bits: int, group: int | None, sym: bool, less_one: bool = True, order: bool = True):
    def store(rng: np.random.Generator, n: int, k: int) -> Stored:
        size, middle = group or k, 1 << bits - 1
        codes, scales = rng.integers(0, 2 * middle, (n, k)), draw_scales(rng, (n, k // size), torch.float16, bits)
        zeros = np.full((n, k // size), middle) if sym else rng.integers(0, 2 * middle, (n, k // size))
        tensors = {
            "qweight": packed(codes, bits).T.contiguous(),
            "qzeros": packed((zeros.T - less_one) & (2 * middle - 1), bits),
            "scales": scales.T.contiguous(),
        }
        if order:
            tensors["g_idx"] = torch.arange(k, dtype=torch.int32) // size
        places = spread(zeros, (1, size), (n, k)), spread(scales.float().numpy(), (1, size), (n, k))
        return tensors, (codes - places[0]).astype(np.float32) * places[1]

    return store


def awq(group: int | None):
    def store(rng: np.random.Generator, n: int, k: int) -> Stored:
        size, order = group or k, [0, 2, 4, 6, 1, 3, 5, 7]
        codes, zeros = rng.integers(0, 16, (n, k)), rng.integers(0, 16, (n, k // size))
        scales = draw_scales(rng, (n, k // size), torch.float16, 4)
        mixed = [8 * (place // 8) + order[place % 8] for place in range(n)]
        tensors = {"qweight": packed(codes[mixed].T, 4), "qzeros": packed(zeros[mixed].T, 4), "scales": scales.T.contiguous()}
        places = spread(zeros, (1, size), (n, k)), spread(scales.float().numpy(), (1, size), (n, k))
        return tensors, (codes - places[0]).astype(np.float32) * places[1]

    return store


def compressed(format_: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {"quant_method": "compressed-tensors", "format": format_, "config_groups": {"group_0": group}, "ignore": ["lm_head"]}


FLOAT = {"num_bits": 8, "type": "float", "symmetric": True}
TOKEN = {"strategy": "token", "dynamic": True}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
DEEPSEEK = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True, "checkpoint_format": "gptq"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}

FORMATS: Mapping[str, Format] = {
    "fp8-blocks": Format({**DEEPSEEK, "weight_block_size": [128, 128]}, scaled((128, 128), "weight_scale_inv", torch.bfloat16)),
    "fp8-static": Format(
        {**DEEPSEEK, "activation_scheme": "static"}, scaled((None, None), "weight_scale", torch.float32, inputs="input_scale")
    ),
    "fp8-tensor": Format(
        {**DEEPSEEK, "activation_scheme": "static", "weight_block_size": None},
        scaled((None, None), "weight_scale_inv", torch.bfloat16, inputs="activation_scale"),
    ),
    "float-channel": Format(
        compressed("float-quantized", {**FLOAT, "strategy": "channel"}, {**FLOAT, **TOKEN}),
        scaled((1, None), "weight_scale", torch.bfloat16),
    ),
    "float-tensor": Format(
        compressed("float-quantized", {**FLOAT, "strategy": "tensor"}, {**FLOAT, "strategy": "tensor"}),
        scaled((None, None), "weight_scale", torch.bfloat16, inputs="input_scale"),
    ),
    "float-blocks": Format(
        compressed(
            "float-quantized",
            {**FLOAT, "strategy": "block", "block_structure": [64, 32]},
            {**FLOAT, "strategy": "group", "group_size": 32, "dynamic": True},
        ),
        scaled((64, 32), "weight_scale", torch.float32),
    ),
    "naive-weights": Format(
        compressed("naive-quantized", {**FLOAT, "strategy": "channel"}), scaled((1, None), "weight_scale", torch.float16)
    ),
    "int-w8a8": Format(
        compressed("int-quantized", {**INT8, "strategy": "channel"}, {**INT8, **TOKEN}),
        scaled((1, None), "weight_scale", torch.bfloat16, bits=8),
    ),
    "int-static": Format(
        compressed("int-quantized", {**INT8, "strategy": "tensor"}, {**INT8, "strategy": "tensor"}),
        scaled((None, None), "weight_scale", torch.float32, bits=8, inputs="input_scale"),
    ),
    "int-zeros": Format(
        compressed("int-quantized", {**INT8, "symmetric": False, "strategy": "channel"}, {**INT8, **TOKEN}),
        scaled((1, None), "weight_scale", torch.bfloat16, bits=8, zeros=True),
    ),
    "int-w4a8": Format(compressed("int-quantized", INT4, {**INT8, **TOKEN}), scaled((1, 32), "weight_scale", torch.bfloat16, bits=4)),
    "packed-w4": Format(compressed("pack-quantized", INT4), pack_quantized(4, 32, zeros=False)),
    "packed-w4-zeros": Format(compressed("pack-quantized", {**INT4, "symmetric": False}), pack_quantized(4, 32, zeros=True)),
    "packed-w8": Format(compressed("pack-quantized", {**INT8, "strategy": "channel"}), pack_quantized(8, None, zeros=False)),
    "packed-w8-zeros": Format(
        compressed("pack-quantized", {**INT8, "symmetric": False, "strategy": "channel"}), pack_quantized(8, None, zeros=True)
    ),
    "gptq-sym": Format(GPTQ, gptq(4, 32, sym=True)),
    "gptq-asym": Format({**GPTQ, "sym": False}, gptq(4, 32, sym=False)),
    "gptq-v2": Format({**GPTQ, "checkpoint_format": "gptq_v2", "sym": False}, gptq(4, 32, sym=False, less_one=False, order=False)),
    "gptq-8": Format({**GPTQ, "bits": 8, "group_size": -1}, gptq(8, None, sym=True)),
    "gptq-8-asym": Format({**GPTQ, "bits": 8, "sym": False}, gptq(8, 32, sym=False)),
    "bitsandbytes": Format({"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}, bitsandbytes),
    "awq": Format(AWQ, awq(32)),
    "awq-whole": Format({**AWQ, "group_size": -1}, awq(None)),
}


def write_layers(path: Path, config: dict[str, Any], layers: Mapping[str, Tensors], settings: dict[str, Any] | None = None) -> Path:
    """A directory of the Llama architecture with these tensors, by layer."""
    path.mkdir(parents=True, exist_ok=True)
    known = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 256, "eos_token_id": 2, "hidden_size": 64}
    (path / "config.json").write_text(json.dumps({**known, **(settings or {}), "quantization_config": config}))
    tensors = {f"{layer}.{part}": tensor for layer, parts in layers.items() for part, tensor in parts.items()}
    safetensors.torch.save_file(tensors, path / "model.safetensors")
    return path
