"""How each token is spelled: its own bytes, which need not be whole characters.

A decoder of the usual kinds is a table in disguise: byte-level BPE spells every byte as a printable character, SentencePiece writes
"▁" for a space and `<0xNN>` for a byte. Reading the table directly costs a dictionary look-up a token; other decoders are left to
the library.

    token id ──▶ "Ġcafé" spelled in GPT-2's alphabet ──▶ b" caf\\xc3\\xa9" ──▶ " café", or None when the bytes are not whole characters
"""

import json
import re
from typing import Any

import tokenizers

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable ones stand for themselves, the others for the characters from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


class Spelling:
    """The bytes and the text of every token of one vocabulary, worked out when a token is first seen."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self.backend = backend
        self.special = frozenset(token for token, added in backend.get_added_tokens_decoder().items() if added.special)
        self.spell, self.strip = _scheme(backend)
        """`spell` is None when only the library can decode. `strip` is how many spaces decoding removes at the start of a text."""
        self._bytes: dict[int, bytes] = {}
        self.texts = _Texts(self, frozenset())
        """Token id to text; None when the bytes are not whole characters."""
        self.texts_without_special = _Texts(self, self.special)
        """The same with nothing for special tokens."""

    def bytes_of(self, token: int) -> bytes:
        """The token's own bytes; none for an id without a token, as padded vocabularies have."""
        spelled = self._bytes.get(token)
        if spelled is None:
            text = self.backend.id_to_token(token)
            if text is None:
                spelled = b""
            elif self.spell is not None:
                spelled = self.spell(text)
            else:
                spelled = self.backend.decode([token], skip_special_tokens=False).encode()
            self._bytes[token] = spelled
        return spelled

    def text_of(self, token: int) -> str:
        """The token's text alone, with U+FFFD for what is not a whole character."""
        return self.bytes_of(token).decode(errors="replace")


class _Texts(dict[int, str | None]):
    def __init__(self, spelling: Spelling, hidden: frozenset[int]) -> None:
        super().__init__()
        self._spelling = spelling
        self._hidden = hidden

    def __missing__(self, token: int) -> str | None:
        spelled = b"" if token in self._hidden else self._spelling.bytes_of(token)
        try:
            text = spelled.decode()
        except UnicodeDecodeError:
            text = None
        self[token] = text
        return text


def _spell_byte_level(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF[character] for character in token])
    except KeyError:  # an added token in plain text
        return token.encode()


def _spell_spaces(token: str) -> bytes:
    return token.replace("▁", " ").encode()


def _spell_spaces_and_bytes(token: str) -> bytes:
    if _BYTE_TOKEN.fullmatch(token):
        return bytes([int(token[3:5], 16)])
    return _spell_spaces(token)


def _scheme(backend: tokenizers.Tokenizer) -> tuple[Any, int]:
    """Recognizes a decoder that is a table: how it spells a token, and the spaces it strips from the start of a text."""
    decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder else {}
    steps = decoder.get("decoders", [decoder])
    match [step.get("type") for step in steps]:
        case ["ByteLevel"]:
            return _spell_byte_level, 0
        case ["Metaspace"] if steps[0].get("replacement") == "▁":
            return _spell_spaces, 0 if steps[0].get("prepend_scheme") == "never" else 1
        case ["Replace", "ByteFallback", "Fuse"] if _replaces_spaces(steps[0]):
            return _spell_spaces_and_bytes, 0
        case ["Replace", "ByteFallback", "Fuse", "Strip"] if (
            _replaces_spaces(steps[0]) and steps[3].get("content") == " " and not steps[3].get("stop")
        ):
            return _spell_spaces_and_bytes, steps[3].get("start", 0)
    return None, 0


def _replaces_spaces(step: dict[str, Any]) -> bool:
    return step.get("pattern") == {"String": "▁"} and step.get("content") == " "
