"""The text of one request as its tokens come.

A character's bytes may lie in several tokens; they are held back until the character is whole, so no client ever sees half of one.
What is still incomplete when the request ends is dropped. Bytes that can never become a character are one U+FFFD each, as Unicode
recommends.

The output continues the prompt: a SentencePiece token that begins with a space keeps it, unless there is no text before it at all.
"""

from codecs import utf_8_decode
from collections.abc import Iterable

from tokenizers.decoders import DecodeStream

from headrace.tokenizer_proc.spelling import Spelling


class TextStream:
    """Turns token ids into text, one by one. The texts of all tokens, joined, are the text of the whole."""

    __slots__ = ("_held", "_simple", "_special", "_spelling", "_strip", "_texts")

    def __init__(self, spelling: Spelling, skip_special: bool, prompt: Iterable[int] = ()) -> None:
        self._spelling = spelling
        self._texts = spelling.texts_without_special if skip_special else spelling.texts
        self._special = spelling.special if skip_special else frozenset()
        self._held = b""
        self._strip = spelling.strip
        if self._strip and any(self._texts[token] != "" for token in prompt):
            self._strip = 0
        self._simple = not self._strip
        """Nothing is held and nothing is to be stripped: the next token's text is the table's."""

    def add(self, token: int) -> str:
        """The text that this token completes."""
        text = self._texts[token]
        if self._simple and text is not None:
            return text
        return self._add_bytes(b"" if token in self._special else self._spelling.bytes_of(token))

    def _add_bytes(self, spelled: bytes) -> str:
        held = self._held + spelled
        text, used = utf_8_decode(held, "replace", False)
        self._held = held[used:]
        if b"\xed\xa0" <= self._held < b"\xee":
            # Python waits for the third byte of a surrogate, which is no character.
            text, self._held = text + "\ufffd\ufffd", b""
        while self._strip and text:
            self._strip = self._strip - 1 if text[0] == " " else 0
            text = text.removeprefix(" ") if text[0] == " " else text
        self._simple = not self._held and not self._strip
        return text


class LibraryTextStream:
    """The same through the library, for decoders that are no table."""

    __slots__ = ("_backend", "_stream")

    def __init__(self, spelling: Spelling, skip_special: bool) -> None:
        self._backend = spelling.backend
        self._stream = DecodeStream(skip_special_tokens=skip_special)

    def add(self, token: int) -> str:
        return self._stream.step(self._backend, token) or ""


def text_stream(spelling: Spelling, skip_special: bool, prompt: Iterable[int] = ()) -> TextStream | LibraryTextStream:
    """A new stream of output text after `prompt`."""
    if spelling.spell is None:
        return LibraryTextStream(spelling, skip_special)
    return TextStream(spelling, skip_special, prompt)
