"""The default model through the Triton kernels on a machine without a GPU: the whole engine, and the same tokens as the reference's."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from headrace.client import Client
from tests.serving import Command

pytest.importorskip("triton", reason="the extra headrace[triton] is not installed")

# Float32 throughout: tokens are compared with those of other kernels.
SETTINGS = ("--port", "0", "--kv-memory", "200MiB", "--activations", "f32", "--kv-dtype", "f32", "--hang-timeout", "600")


def answers(kernels: str, bodies: list[dict[str, Any]]) -> list[str]:
    with (
        Command("serve", "--kernels", kernels, *SETTINGS) as served,
        Client(served.url, timeout=900) as client,
        ThreadPoolExecutor(len(bodies)) as pool,
    ):

        def ask(body: dict[str, Any]) -> str:
            return client.complete(**body).choices[0].text

        texts = list(pool.map(ask, bodies))
        # From the prefix cache, and alone.
        assert ask(bodies[0]) == texts[0]
        return texts


@pytest.mark.slow
def test_twenty_prompts_of_64_tokens_are_what_the_reference_gives():
    bodies = [
        {
            "prompt": f"Chapter {place}. " + "It was a dark night, and " * (place % 4) + "the",
            "max_tokens": 64,
            "temperature": 0,
            "ignore_eos": True,
        }
        for place in range(20)
    ]
    assert answers("triton", bodies) == answers("reference", bodies)
