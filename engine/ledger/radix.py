"""The radix tree of computed prefixes.

Each node is one full page: its edge is the page's tokens, its path from the root is the whole prefix that the page's keys and
values depend on. Nodes of a page each need no splitting, and a longest match is a walk of dictionary look-ups.

    root ─(The, quick, …)─▶ page 3 ─(fox, jumps, …)─▶ page 9
                                   └(dog, sleeps, …)─▶ page 4

`users` counts the requests whose table contains the node's page. A child's users also use its parents, so that the nodes without
users form whole subtrees: everything in them can be evicted, leaves first, the least recently used before the others.
"""

from collections.abc import Iterator, Sequence
from heapq import heapify, heappop, heappush


class Node:
    __slots__ = ("children", "key", "last_used", "page", "parent", "users")

    def __init__(self, key: tuple[int, ...], page: int, parent: "Node | None") -> None:
        self.key = key
        self.page = page
        self.parent = parent
        self.children: dict[tuple[int, ...], Node] = {}
        self.users = 0
        self.last_used = 0
        """Step in which the last user came or went."""


class RadixTree:
    """Prefixes by page. Steps are the only time it knows."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.root = Node((), -1, None)
        self.size = 0
        """Nodes, which is cached pages."""
        self.idle = 0
        """Nodes without users: what eviction can free."""
        self._leaves: list[tuple[int, int, Node]] = []
        """Heap of (last_used, page, node) of nodes that were idle leaves when pushed; stale entries are skipped."""

    def match(self, tokens: Sequence[int], most: int) -> list[Node]:
        """The longest path whose pages hold a prefix of `tokens`, at most `most` pages. Changes nothing."""
        size = self.page_size
        node, path = self.root, []
        for start in range(0, min(most, len(tokens) // size) * size, size):
            child = node.children.get(tuple(tokens[start : start + size]))
            if child is None:
                break
            path.append(child)
            node = child
        return path

    def use(self, path: Sequence[Node], step: int) -> None:
        """One more request has these nodes in its table."""
        for node in path:
            if node.users == 0:
                self.idle -= 1
            node.users += 1
            node.last_used = step

    def drop(self, path: Sequence[Node], step: int) -> None:
        """A request that used these nodes is gone."""
        for node in path:
            node.users -= 1
            node.last_used = step
            if node.users == 0:
                self.idle += 1
                if not node.children:
                    self._offer(node)

    def extend(self, parent: Node, key: tuple[int, ...], page: int, step: int) -> tuple[Node, bool]:
        """The child of `parent` for the tokens `key`, with one more user; whether it is new and so took `page`.

        When another request has cached the same tokens before, its page stands and `page` stays the caller's.
        """
        child = parent.children.get(key)
        new = child is None
        if child is None:
            child = parent.children[key] = Node(key, page, parent)
            self.size += 1
        elif child.users == 0:
            self.idle -= 1
        child.users += 1
        child.last_used = step
        return child, new

    def evict(self) -> int | None:
        """Forget the least recently used idle leaf; its page, or None when every node has users."""
        while self._leaves:
            last_used, page, node = heappop(self._leaves)
            parent = node.parent
            if parent is None or node.users or node.children or node.last_used != last_used:
                continue
            del parent.children[node.key]
            node.parent = None
            self.size -= 1
            self.idle -= 1
            if parent.users == 0 and parent is not self.root and not parent.children:
                self._offer(parent)
            return page
        return None

    def _offer(self, leaf: Node) -> None:
        """Put an idle leaf up for eviction."""
        if len(self._leaves) > 4 * self.size + 64:
            self._leaves = [(node.last_used, node.page, node) for node in self.nodes() if not node.users and not node.children]
            heapify(self._leaves)
        else:
            heappush(self._leaves, (leaf.last_used, leaf.page, leaf))

    def nodes(self) -> Iterator[Node]:
        """Every node but the root, parents first."""
        stack = list(self.root.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())
