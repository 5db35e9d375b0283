#!/usr/bin/env python3
"""Make a Llama of about a billion random weights as a GGUF file: a bigger test case than any small model that can be shipped.

    scripts/bench/random_model.py TOKENIZER.gguf OUT.gguf --format q8_0|q4_k [--layers N] [--hidden N] …

Speed does not depend on what weights say, only on their shapes and format, as long as activations stay finite and of ordinary size:
every matrix here is centred and scaled by 1/sqrt(inputs), as at the start of a training. The vocabulary and its tokenizer are those of
an existing file, so that any server can load the result. What it answers is noise.

    Q8_0 block   scale f16 │ 32 codes int8                                            value = scale * code
    Q4_K block   d f16 │ dmin f16 │ 12 bytes: 8 × 6-bit scale, minimum │ 256 nibbles  value = d * scale * code - dmin * minimum
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType

ROWS_AT_ONCE = 4096
CODE_STD = {"q8_0": np.sqrt((255**2 - 1) / 12), "q4_k": np.sqrt((16**2 - 1) / 12)}
"""Standard deviation of uniformly drawn codes."""
LEAST_SCALE, MOST_SCALE = 32, 63
"""Of the six bits of a Q4_K scale, those that use the upper half, as real files mostly do."""


@dataclass(frozen=True)
class Shape:
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    mlp: int
    context: int

    def matrices(self, vocabulary: int) -> Iterator[tuple[str, int, int, float]]:
        """(name, outputs, inputs, gain) of each. What is added to the residual stream is small: there are many layers."""
        head_dim = self.hidden // self.heads
        kv = self.kv_heads * head_dim
        to_residual = 1 / np.sqrt(2 * self.layers)
        yield "token_embd", vocabulary, self.hidden, 1.0
        for layer in range(self.layers):
            for name, outputs, inputs, gain in (
                ("attn_q", self.hidden, self.hidden, 1.0),
                ("attn_k", kv, self.hidden, 1.0),
                ("attn_v", kv, self.hidden, 1.0),
                ("attn_output", self.hidden, self.hidden, to_residual),
                ("ffn_gate", self.mlp, self.hidden, 1.0),
                ("ffn_up", self.mlp, self.hidden, 1.0),
                ("ffn_down", self.hidden, self.mlp, to_residual),
            ):
                yield f"blk.{layer}.{name}", outputs, inputs, gain


def q8_0(rng: np.random.Generator, rows: int, inputs: int, std: float) -> np.ndarray:
    """Rows of blocks, uint8 [rows, bytes a row]."""
    blocks = np.empty((rows, inputs // 32, 34), np.uint8)
    scale = np.full((rows, inputs // 32, 1), std / CODE_STD["q8_0"]) * rng.uniform(0.8, 1.2, (rows, inputs // 32, 1))
    blocks[:, :, :2] = scale.astype(np.float16).view(np.uint8)
    blocks[:, :, 2:] = rng.integers(-127, 128, (rows, inputs // 32, 32), np.int8).view(np.uint8)
    return blocks.reshape(rows, -1)


def q4_k(rng: np.random.Generator, rows: int, inputs: int, std: float) -> np.ndarray:
    """Rows of blocks, uint8 [rows, bytes a row]. With minimum = scale and dmin = 7.5 d, values are centred: d * scale * (code - 7.5)."""
    count = (rows, inputs // 256)
    blocks = np.empty((*count, 144), np.uint8)
    d = std / (CODE_STD["q4_k"] * (LEAST_SCALE + MOST_SCALE) / 2) * rng.uniform(0.8, 1.2, (*count, 1))
    blocks[..., 0:2] = d.astype(np.float16).view(np.uint8)
    blocks[..., 2:4] = (7.5 * d).astype(np.float16).view(np.uint8)
    scales = rng.integers(LEAST_SCALE, MOST_SCALE + 1, (*count, 8), np.uint8)
    # The 6-bit numbers 0-3 lie in the low bits of 4 bytes each; of 4-7 the low nibbles share 4 bytes, the high pairs top up the others.
    high = scales[..., 4:] >> 4 << 6
    blocks[..., 4:8] = scales[..., :4] | high
    blocks[..., 8:12] = scales[..., :4] | high
    blocks[..., 12:16] = (scales[..., 4:] & 15) | (scales[..., 4:] & 15) << 4
    blocks[..., 16:] = rng.integers(0, 256, (*count, 128), np.uint8)
    return blocks.reshape(rows, -1)


FORMATS = {
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0, q8_0, 32),
    "q4_k": (GGMLQuantizationType.Q4_K, LlamaFileType.MOSTLY_Q4_K_S, q4_k, 256),
}


def matrix(rng: np.random.Generator, form: str, outputs: int, inputs: int, std: float) -> np.ndarray:
    """Made in pieces, as drawing codes takes more memory than the codes."""
    make = FORMATS[form][2]
    return np.concatenate([make(rng, min(ROWS_AT_ONCE, outputs - top), inputs, std) for top in range(0, outputs, ROWS_AT_ONCE)])


def write(tokenizer: Path, out: Path, form: str, shape: Shape, seed: int) -> int:
    """Write the file; how many weights it has."""
    rng = np.random.default_rng(seed)
    source = GGUFReader(tokenizer)
    kind, file_type, _, _ = FORMATS[form]
    writer = GGUFWriter(out, "llama")
    writer.add_name(f"random Llama, {shape.layers} layers of {shape.hidden}")
    writer.add_file_type(file_type)
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.mlp)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.hidden // shape.heads)
    writer.add_rope_freq_base(500_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    for name, field in source.fields.items():
        if name.startswith("tokenizer."):
            writer.add_key_value(name, field.contents(), field.types[0], field.types[1] if len(field.types) > 1 else None)
    vocabulary = len(source.fields["tokenizer.ggml.tokens"].data)
    writer.add_vocab_size(vocabulary)
    norms = ["output_norm", *(f"blk.{layer}.{name}" for layer in range(shape.layers) for name in ("attn_norm", "ffn_norm"))]
    for name in norms:
        writer.add_tensor(f"{name}.weight", np.ones(shape.hidden, np.float32))
    weights = 0
    for name, outputs, inputs, gain in shape.matrices(vocabulary):
        writer.add_tensor(f"{name}.weight", matrix(rng, form, outputs, inputs, gain / np.sqrt(inputs)), raw_dtype=kind)
        weights += outputs * inputs
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a Llama of random weights as a GGUF file.")
    parser.add_argument("tokenizer", type=Path, metavar="TOKENIZER.gguf", help="a file whose vocabulary to take")
    parser.add_argument("out", type=Path, metavar="OUT.gguf")
    parser.add_argument("--format", choices=sorted(FORMATS), required=True)
    for name, default in (("layers", 16), ("hidden", 2048), ("heads", 32), ("kv-heads", 8), ("mlp", 8192), ("context", 8192), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help="default: %(default)s")
    chosen = parser.parse_args()
    block = FORMATS[chosen.format][3]
    for name in ("hidden", "mlp"):
        if getattr(chosen, name) % block:
            parser.error(f"--{name} {getattr(chosen, name)} is no multiple of {block}, the block of {chosen.format}")
    if chosen.hidden % chosen.heads or chosen.heads % chosen.kv_heads:
        parser.error(f"--hidden {chosen.hidden}, --heads {chosen.heads} and --kv-heads {chosen.kv_heads} must divide each other")
    shape = Shape(chosen.layers, chosen.hidden, chosen.heads, chosen.kv_heads, chosen.mlp, chosen.context)
    weights = write(chosen.tokenizer, chosen.out, chosen.format, shape, chosen.seed)
    print(f"saved {chosen.out}: {weights / 1e9:.2f} billion weights, {chosen.out.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
