"""Real English for prompts, from what every Python carries: the language's own help topics.

Random ids or repeated words flatter an engine that speculates or caches and hurt one that does not, so prompts are prose. Any text
file can take its place. Nothing here knows of tokens or servers.
"""

import re
from pathlib import Path

from headrace.engine.errors import UserError

MIN_WORDS = 400
"""A file with fewer words would give prompts that repeat themselves."""


def load_words(file: Path | None) -> list[str]:
    """The words of `file`, or of Python's help topics. Raises `UserError` when the file is unreadable or too short."""
    if file is None:
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[name] for name in sorted(topics))
        return _prose(text)
    try:
        words = file.read_text("utf-8", "replace").split()
    except OSError as error:
        raise UserError(f"--dataset {file}: {error.strerror}; give a readable text file") from None
    if len(words) < MIN_WORDS:
        raise UserError(f"--dataset {file} has {len(words)} words: give a text of at least {MIN_WORDS}")
    return words


def _prose(text: str) -> list[str]:
    """The words of those paragraphs that are sentences, not code, grammar or tables."""
    words: list[str] = []
    for paragraph in text.split("\n\n"):
        letters = sum(character.isalpha() or character == " " for character in paragraph)
        if len(paragraph) > 80 and letters > 0.8 * len(paragraph):
            words += re.sub(r"[*\"`]+", "", paragraph).split()
    return words
