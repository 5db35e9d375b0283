"""Sizes in bytes, as people write them: "2GiB", "512MB", "1.5g", "4096"."""

import re

from headrace.engine.errors import UserError

_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_FORM = re.compile(r"(\d+(?:\.\d+)?) *([kmgt]?)(i?)(b?)", re.IGNORECASE | re.ASCII)


def parse_size(text: str) -> int:
    """The number of bytes that `text` names: KiB, MiB, GiB and TiB are powers of 1024, kB, MB, GB and TB of 1000, and a letter alone
    (2G) is read as a power of 1024. UserError names the value.
    """
    found = _FORM.fullmatch(text.strip())
    if found is None or (found[3] and not found[2]):
        raise UserError(f"{text!r} is not a size: write it like 2GiB, 512MB or 4096")
    number, letter, binary, unit = found.groups()
    step = 1000 if unit and not binary else 1024
    return int(float(number) * step ** _POWERS[letter.lower()])


def show_size(size: int) -> str:
    """`size` bytes for people: "1.9 GiB"."""
    value, unit = float(size), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.1f} {unit}" if unit != "bytes" else f"{size} bytes"
