"""The tokenizer of one model: text to ids, ids to text.

Built once at start from a Hugging Face directory or a GGUF file. Safe to encode with from several threads; the library lets go of
the interpreter lock while it works.
"""

from pathlib import Path

from headrace.engine.checkpoint.card import ModelFiles
from headrace.engine.checkpoint.gguf import GGUFFile
from headrace.engine.checkpoint.wording import in_line
from headrace.engine.errors import UserError
from headrace.tokenizer_proc.detokenize import text_stream
from headrace.tokenizer_proc.gguf import parts_from_metadata
from headrace.tokenizer_proc.huggingface import parts_from_directory
from headrace.tokenizer_proc.parts import Parts
from headrace.tokenizer_proc.rejection import Rejection
from headrace.tokenizer_proc.spelling import Spelling


class Tokenizer:
    """Encodes and decodes. Special tokens written out in a text become their ids."""

    def __init__(self, parts: Parts, vocab_size: int, context: int) -> None:
        self.backend = parts.backend
        self.prefix = parts.prefix
        self.suffix = parts.suffix
        self.vocab_size = vocab_size
        """Ids are below this: rows of the embedding table, which may have more than there are tokens."""
        self.context = context
        self.spelling = Spelling(parts.backend)

    def encode(self, text: str, add_special: bool) -> list[int]:
        """The ids of `text`, with BOS and the like around them if `add_special`. Rejection when the text is not Unicode."""
        try:
            # The batch call leaves out the offsets of tokens, which take half of the time.
            ids = self.backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except (TypeError, UnicodeEncodeError):
            raise Rejection("the text holds half of a surrogate pair: send valid Unicode", code="invalid_unicode") from None
        return [*self.prefix, *ids, *self.suffix] if add_special else ids

    def decode(self, ids: list[int] | tuple[int, ...], skip_special: bool = False) -> str:
        """The text of `ids`; bytes that are no whole character, also at the end, become U+FFFD."""
        spelling = self.spelling
        if spelling.spell is None:
            return self.backend.decode(list(ids), skip_special_tokens=skip_special)
        hidden = spelling.special if skip_special else frozenset()
        text = b"".join([spelling.bytes_of(token) for token in ids if token not in hidden]).decode(errors="replace")
        for _ in range(spelling.strip):
            text = text.removeprefix(" ")
        return text

    def stream(self, skip_special: bool, prompt: list[int]):
        """A new stream of output text after `prompt`."""
        return text_stream(self.spelling, skip_special, prompt)

    def pieces(self, ids: list[int]) -> list[str]:
        """The tokens as the vocabulary spells them."""
        return [self.backend.id_to_token(token) or "" for token in ids]

    def check(self, ids: tuple[int, ...] | list[int], param: str) -> None:
        """Rejection when one of `ids` is not in the vocabulary."""
        if ids and (min(ids) < 0 or max(ids) >= self.vocab_size):
            wrong = next(token for token in ids if not 0 <= token < self.vocab_size)
            raise Rejection(
                f"{param} has token id {wrong}, the vocabulary has ids from 0 to {self.vocab_size - 1}: use one of those", param
            )


def load_parts(model: ModelFiles) -> Parts:
    """Read the model's tokenizer. UserError when it is missing, broken or of an unknown kind."""
    try:
        if model.format == "gguf":
            return parts_from_metadata(GGUFFile(model.path).metadata, model.path)
        return parts_from_directory(Path(model.path))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # A value of another kind than its key promises, somewhere among a dozen of them.
        what = f"{type(error).__name__}: {in_line(error)}"
        raise UserError(f"{model.path} has a tokenizer that cannot be read ({what}): the files are damaged, get them again") from None
