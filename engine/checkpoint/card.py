"""What the engine knows of a model before any process has loaded it.

Every process gets a `ModelFiles` from the supervisor; loading proper is left to the tokenizer and the workers.
"""

import msgspec

FAMILIES: dict[str, str] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "MixtralForCausalLM": "mixtral",
    "Gemma3ForCausalLM": "gemma3",
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "gemma3": "gemma3",
}
"""Architecture, as `config.json` or a GGUF file names it, to the family file in `workers/model/` that serves it."""


class ModelFiles(msgspec.Struct, frozen=True):
    """A model found on disk and checked as far as its metadata goes."""

    name: str
    """The name it is served under."""
    path: str
    """Absolute: a GGUF file, or a directory with config.json."""
    format: str
    """"gguf" or "huggingface"."""
    architecture: str
    """A key of FAMILIES."""
    context: int
    """Most tokens of prompt and output together, after `--max-context`."""
    vocab_size: int
    """Rows of the embedding table."""
    end_tokens: tuple[int, ...]
    """Tokens with which the model ends its answer (EOS, end of turn)."""
    bos_token: int | None
    weight_bytes: int
    """Size of the weights on disk."""
