"""How byte-level BPE vocabularies of GGUF files cut text into words before they merge.

A GGUF file does not hold the pre-tokenizer, only its name in `tokenizer.ggml.pre`. Here is what each name stands for: the rule of
the model's own `tokenizer.json`, or, for "default", the rule that llama.cpp applies to files with no better name. A name that is
not in the table is refused, because a near miss changes tokens without a word.

Source of the names: `llama_vocab` of llama.cpp; of the rules: the tokenizers that GPT-2, StarCoder, SmolLM, Llama 3, Qwen2 and
Mistral NeMo ship.
"""

from dataclasses import dataclass

from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class Cut:
    """One pre-tokenizer and what goes with it."""

    patterns: tuple[str, ...] = ()
    """Applied one after the other, each to the pieces of the one before; empty means GPT-2's rule."""
    single_digits: bool = False
    """Every digit is a word of its own, before anything else."""
    composed: bool = False
    """Text is brought to Unicode NFC first."""
    whole_words: bool = False
    """A word that is a token is taken as it stands, without merging."""
    adds_bos: bool = False
    """Whether a BOS is added when the file does not say."""

    def build(self) -> PreTokenizer:
        steps: list[PreTokenizer] = [Digits(individual_digits=True)] if self.single_digits else []
        steps += [Split(Regex(pattern), behavior="isolated") for pattern in self.patterns]
        steps.append(ByteLevel(add_prefix_space=False, use_regex=not self.patterns))
        return Sequence(steps)


_PLAIN = Cut()
_DIGITS = Cut(single_digits=True)
_LLAMA3_CUT = Cut((_LLAMA3,), whole_words=True, adds_bos=True)

CUTS: dict[str, Cut] = {
    "default": Cut((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": _PLAIN,
    "phi-2": _PLAIN,
    "olmo": _PLAIN,
    "mpt": _PLAIN,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "llama-bpe": _LLAMA3_CUT,
    "llama3": _LLAMA3_CUT,
    "llama-v3": _LLAMA3_CUT,
    "dbrx": Cut((_LLAMA3,)),
    "smaug-bpe": Cut((_LLAMA3,)),
    "qwen2": Cut((_QWEN2,), composed=True),
    "deepseek-r1-qwen": Cut((_QWEN2,)),
    "tekken": Cut((_TEKKEN,), whole_words=True, adds_bos=True),
}
"""By the value of `tokenizer.ggml.pre`."""
