"""Which tokens end an answer, and which begins a prompt, by the files of a model.

A model may end with more tokens than the one its file calls EOS: a base model's end of text, a chat model's end of turn, Llama 3.1's
end of message. Missing one means an answer that never stops, so all that the files tell are gathered.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from headrace.engine.checkpoint.hf import read_json

GGUF_END_KEYS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
GGUF_END_TEXTS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>")
"""Control tokens that end a turn or a text wherever they occur in the vocabularies of the supported families.

Files converted before `eot_token_id` existed name only one of them as EOS (often the base model's, while the chat template ends turns with
another), which is why llama.cpp too looks for them by their text. ChatML: <|im_end|>; Llama 3: <|eot_id|>, <|eom_id|>, <|end_of_text|>;
Llama 4: <|eot|>; Gemma: <end_of_turn>; Qwen, SmolLM2: <|endoftext|>, the document border of pretraining, after which text belongs to
another document. "</s>" is not among them: in Gemma's vocabulary it is an HTML tag, and where it is the end token, the file says so.
"""
_TEXT_TYPES = (1, 5, 6)
"""Token types of a GGUF vocabulary that are plain text, unused or a byte: never an end token, whatever they spell."""


class _AddedToken(msgspec.Struct):
    id: int
    content: str


class _TokenizerFile(msgspec.Struct):
    """The part of tokenizer.json that is read here; the rest is skipped over."""

    added_tokens: list[_AddedToken] = []


def gguf_end_tokens(metadata: Mapping[str, Any], vocab_size: int) -> tuple[int, ...]:
    """The ids that the file names, and those of its control tokens that are known to end a turn; sorted."""
    ends = [metadata.get(key) for key in GGUF_END_KEYS]
    tokens, types = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    if isinstance(tokens, list):
        for text in GGUF_END_TEXTS:
            token = tokens.index(text) if text in tokens else None
            if token is not None and not (isinstance(types, list) and token < len(types) and types[token] in _TEXT_TYPES):
                ends.append(token)
    return _valid(ends, vocab_size)


def gguf_bos_token(metadata: Mapping[str, Any], vocab_size: int) -> int | None:
    found = _valid([metadata.get("tokenizer.ggml.bos_token_id")], vocab_size)
    return found[0] if found else None


def hf_end_tokens(directory: Path, config: Mapping[str, Any], vocab_size: int) -> tuple[int, ...]:
    """generation_config.json's end tokens, else config.json's; and the tokenizer's own, with which chat templates end turns."""
    generation = _optional(directory / "generation_config.json")
    ends: list[Any] = []
    for source in (generation, config):
        named = source.get("eos_token_id")
        ends = _integers(named if isinstance(named, list) else [named])
        if ends:
            break
    tokenizer = _optional(directory / "tokenizer_config.json")
    return _valid([*ends, _token_id(directory, tokenizer, "eos_token")], vocab_size)


def hf_bos_token(directory: Path, config: Mapping[str, Any], vocab_size: int) -> int | None:
    """The tokenizer's, which may say that there is none; else config.json's."""
    tokenizer = _optional(directory / "tokenizer_config.json")
    token = _token_id(directory, tokenizer, "bos_token") if "bos_token" in tokenizer else config.get("bos_token_id")
    found = _valid([token], vocab_size)
    return found[0] if found else None


def _token_id(directory: Path, tokenizer: Mapping[str, Any], key: str) -> int | None:
    """The id of a special token that tokenizer_config.json names by its text."""
    named = tokenizer.get(key)
    text = named.get("content") if isinstance(named, dict) else named
    if not isinstance(text, str):
        return None
    decoder = tokenizer.get("added_tokens_decoder")
    for token, entry in decoder.items() if isinstance(decoder, dict) else ():
        if isinstance(entry, dict) and entry.get("content") == text and token.isdecimal():
            return int(token)
    try:
        added = msgspec.json.decode((directory / "tokenizer.json").read_bytes(), type=_TokenizerFile).added_tokens
    except (OSError, ValueError, RecursionError):  # The tokenizer process reports a broken tokenizer.json better than this could.
        return None
    return next((token.id for token in added if token.content == text), None)


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _integers(values: list[Any]) -> list[int]:
    return [value for value in values if type(value) is int]


def _valid(values: list[Any], vocab_size: int) -> tuple[int, ...]:
    """Those that are token ids; a file's 2³²-1 and -1 mean "none"."""
    return tuple(sorted({value for value in _integers(values) if 0 <= value < vocab_size}))
