"""Trees of drafts: the path that is what was sampled anyway, in every backend."""

import random

import pytest
import torch

from headrace.kernels.drafts import NO_TOKEN, DraftTrees, Verified, chains, walk
from headrace.kernels.reference import ReferenceBackend
from tests.kernels.trees import trees_of

#      root ─┬─ 5 ─┬─ 6
#            │     └─ 7 ── 9
#            └─ 8
BUSH = ([-1, 0, 1, 1, 0, 3], [0, 5, 6, 7, 8, 9])


def path(tokens: list[int], ends: frozenset[int] = frozenset()) -> tuple[list[int], list[int]]:
    verified = walk(DraftTrees([0, 6], *BUSH, [ends]), tokens)
    return verified.rows[0], verified.tokens[0]


def test_a_path_goes_where_the_drafts_are_what_was_sampled_and_emits_the_token_behind_it():
    assert path([5, 7, 1, 9, 1, 2]) == ([0, 1, 3, 5], [5, 7, 9, 2])
    assert path([5, 4, 1, 9, 1, 2]) == ([0, 1], [5, 4])
    assert path([8, 7, 1, 9, 3, 2]) == ([0, 4], [8, 3])
    assert path([9, 7, 1, 9, 1, 2]) == ([0], [9])


def test_an_end_token_is_the_last_though_the_draft_behind_it_is_right():
    assert path([5, 7, 1, 9, 1, 2], frozenset({7})) == ([0, 1], [5, 7])


def test_a_path_ends_before_a_row_whose_logits_are_invalid():
    assert path([5, 7, 1, NO_TOKEN, 1, 2]) == ([0, 1], [5, 7])
    assert path([NO_TOKEN, 7, 1, 9, 1, 2]) == ([], [])


def test_of_siblings_with_one_token_the_first_is_followed():
    assert walk(DraftTrees([0, 3], [-1, 0, 0], [0, 4, 4], [()]), [4, 1, 2]) == Verified([[0, 1]], [[4, 1]])


def by_definition(trees: DraftTrees, tokens: list[int], request: int, row: int = 0) -> list[tuple[int, int]]:
    """Rows and tokens of the path from a row on."""
    begin, end = trees.starts[request : request + 2]
    if row >= end - begin or tokens[begin + row] < 0:
        return []
    token = tokens[begin + row]
    right = [child for child in range(1, end - begin) if (trees.parents[begin + child], trees.drafts[begin + child]) == (row, token)]
    on = [] if token in trees.end_tokens[request] or not right else by_definition(trees, tokens, request, right[0])
    return [(row, token), *on]


def test_any_tree_is_walked_as_the_definition_says():
    dice = random.Random(11)
    for _ in range(300):
        trees = trees_of(dice, [dice.randrange(9) for _ in range(dice.randrange(4))], 3)
        tokens = [dice.choice((NO_TOKEN, 0, 1, 1, 2, 2)) for _ in trees.parents]
        paths = [by_definition(trees, tokens, request) for request in range(len(trees.end_tokens))]
        assert walk(trees, tokens) == Verified(
            [[row for row, _ in path] for path in paths], [[token for _, token in path] for path in paths]
        )


def test_requests_are_walked_each_by_itself_and_one_without_rows_emits_nothing():
    trees = DraftTrees([0, 0, 2, 2, 3], [-1, 0, -1], [0, 3, 0], [(), (), (), ()])
    assert walk(trees, [3, 4, 5]) == Verified([[], [0, 1], [], [0]], [[], [3, 4], [], [5]])
    assert walk(DraftTrees([0], [], [], []), []) == Verified([], [])


def test_a_chain_is_a_tree_of_one_branch():
    trees = chains([[7, 8], [], [9]], [(), (), ()])
    assert trees == DraftTrees([0, 3, 4, 6], [-1, 0, 1, -1, -1, 0], [-1, 7, 8, -1, -1, 9], [(), (), ()])
    assert walk(trees, [7, 8, 1, 2, 9, 3]).tokens == [[7, 8, 1], [2], [9, 3]]


WRONG = [
    (([0, 2], [-1], [0], [()]), "starts .* do not part 1 rows"),
    (([], [], [], []), "starts"),
    (([0, 2, 1, 2], [-1, 0], [0, 1], [(), (), ()]), "starts"),
    (([0, 2], [-1, 0], [0], [()]), "1 drafts for 2 rows"),
    (([0, 2], [-1, 0], [0, 1], []), "0 sets of end tokens for 1 requests"),
    (([0, 2], [0, 0], [0, 1], [()]), "row 0 .* follows row 0"),
    (([0, 2], [-1, 1], [0, 1], [()]), "row 1 .* follows row 1"),
    (([0, 2], [-1, -1], [0, 1], [()]), "row 1 .* follows row -1"),
    (([0, 1, 3], [-1, -1, 1], [0, 1, 1], [(), ()]), "row 1 of the request from row 1 on follows row 1"),
]


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    if request.param == "reference":
        return ReferenceBackend()
    return pytest.importorskip("headrace.kernels.cpu", reason="the extension is not built").CpuBackend(1)


@pytest.mark.parametrize(("parts", "words"), WRONG)
def test_what_are_no_trees_is_refused_by_every_backend(backend, parts, words):
    with pytest.raises(ValueError, match=words):
        backend.verify(DraftTrees(*parts), [1] * len(parts[1]))


def test_every_row_needs_a_token(backend):
    with pytest.raises(ValueError, match="1 tokens for 2 rows"):
        backend.verify(chains([[3]], [()]), [1])


def test_every_backend_walks_as_the_host_does(backend):
    dice = random.Random(4)
    for sizes in ([3, 0, 1, 9], [0], [], [40], [1] * 17, [5, 5, 0, 0, 12]):
        trees = trees_of(dice, sizes, 4)
        tokens = [dice.choice((NO_TOKEN, 0, 1, 2, 3, 3)) for _ in trees.parents]
        array = torch.tensor(tokens, dtype=torch.int64)
        assert backend.verify(trees, tokens) == walk(trees, tokens)
        assert backend.verify(trees, array.numpy() if backend.name == "cpu" else array) == walk(trees, tokens)
