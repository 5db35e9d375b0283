"""How much of the host's memory KV pages take where nobody says otherwise."""

import os

MOST_KV_BYTES = 4 << 30


def host_room() -> int:
    """A quarter of the free memory, but no more than MOST_KV_BYTES."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(free // 4, MOST_KV_BYTES)
