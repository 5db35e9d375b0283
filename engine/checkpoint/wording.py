"""Foreign text within a message: what a file or a library says, cut and escaped so that the message stays one line.

Used by every reader of this package; never changes what is short and plain.
"""


def shown(value: object) -> str:
    """A value from a file as Python would write it, at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


def in_line(error: BaseException) -> str:
    """The text of another library's error on one line of at most 200 characters."""
    return " ".join(str(error).split())[:200]
