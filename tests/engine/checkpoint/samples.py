"""Small model files for tests: GGUF by the gguf package, a Hugging Face directory by the safetensors package."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import safetensors.numpy

VOCABULARY = ["<unk>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "a", "b", "<|eot_id|>", "é"]
TYPES = [3, 3, 3, 3, 1, 1, 1, 1]
HIDDEN = 64


def write_gguf(
    path: Path,
    *,
    architecture: str = "llama",
    values: dict[str, int] | None = None,
    tensors: dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType | None]] | None = None,
    name: str | None = "Tiny Model 1B",
    context: int | None = 512,
    eos: int | None = 2,
) -> Path:
    """A GGUF file with a token embedding of 8 rows; `values` are further uint32 metadata."""
    writer = gguf.GGUFWriter(str(path), architecture)
    if name:
        writer.add_name(name)
    if context is not None:
        writer.add_context_length(context)
    for key, value in (values or {}).items():
        writer.add_uint32(key, value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types(TYPES)
    writer.add_token_scores([0.5] * len(VOCABULARY))
    if eos is not None:
        writer.add_eos_token_id(eos)
    writer.add_bos_token_id(1)
    writer.add_array("test.nested", [[1, 2], [3, 4]])
    writer.add_bool("test.flag", True)
    if tensors is None:
        tensors = {
            "token_embd.weight": (np.arange(8 * HIDDEN, dtype=np.float32).reshape(8, HIDDEN), None),
            "output_norm.weight": (np.ones(HIDDEN, np.float32), None),
        }
    for tensor, (data, kind) in tensors.items():
        writer.add_tensor(tensor, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_directory(path: Path, *, shards: int = 1, config: dict[str, Any] | None = None, prefix: str = "model.") -> Path:
    """A Hugging Face directory of the Llama architecture with three tensors, in one file or several."""
    path.mkdir(parents=True, exist_ok=True)
    settings = {
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 256,
        "vocab_size": 8,
        "eos_token_id": 2,
        "bos_token_id": 1,
        "hidden_size": HIDDEN,
    }
    (path / "config.json").write_text(json.dumps({**settings, **(config or {})}))
    tensors = {
        f"{prefix}embed_tokens.weight": np.arange(8 * HIDDEN, dtype=np.float32).reshape(8, HIDDEN),
        f"{prefix}layers.0.self_attn.q_proj.weight": np.arange(HIDDEN * HIDDEN, dtype=np.float16).reshape(HIDDEN, HIDDEN),
        f"{prefix}norm.weight": np.linspace(0, 1, HIDDEN, dtype=np.float32),
    }
    if shards == 1:
        safetensors.numpy.save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return path
    weight_map: dict[str, str] = {}
    names = list(tensors)
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        safetensors.numpy.save_file(part, path / file)
        weight_map |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path
