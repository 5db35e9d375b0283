"""One engine with a worker that has no model serves all the endpoint's tests: its tokens follow from the seed alone."""

import openai
import pytest

from tests.serving import Served


@pytest.fixture(scope="session")
def served():
    with Served() as served:
        yield served


@pytest.fixture(scope="session")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=30) as client:
        yield client
