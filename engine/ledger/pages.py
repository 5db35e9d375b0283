"""The pool of KV pages that hold nothing.

A page is in exactly one of three places:

    free    in `PagePool`
    cached  in a node of the radix tree, shared by any number of requests, or by none until it is evicted
    held    in the table of one request that has not filled it yet
"""


class PagePool:
    """Free pages, taken and given back in an order that depends on nothing but the calls (last in, first out)."""

    __slots__ = ("_free", "total")

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total - 1, -1, -1))

    def __len__(self) -> int:
        return len(self._free)

    def take(self) -> int:
        """One free page; `IndexError` when there is none."""
        return self._free.pop()

    def give(self, page: int) -> None:
        self._free.append(page)

    def pages(self) -> list[int]:
        """The free pages, for `Ledger.check`."""
        return list(self._free)
