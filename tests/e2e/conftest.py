"""One engine with the real model serves all tests that do it no harm."""

from collections.abc import Iterator

import pytest

from tests.serving import REAL, Served


@pytest.fixture(scope="session")
def served() -> Iterator[Served]:
    with Served(REAL, threads=2) as served:
        yield served
