"""A rank whose ledger differs by one bit is found out in the very step in which it does, and no stream notices."""

import asyncio
from typing import Any

import pytest

from tests.e2e.flipping import order
from tests.e2e.streams import Streams, differences, run
from tests.serving import Served

FLIPPING = "tests.e2e.flipping"


@pytest.mark.parametrize(
    ("ranks", "rank", "draft", "tokens"), [(1, 0, "none", 120), (1, 0, "ngram", 500), (2, 1, "none", 120), (2, 0, "none", 120)]
)
async def test_a_flipped_bit_in_a_ranks_ledger_is_found_out_at_its_step_and_streams_go_on(ranks, rank, draft, tokens):
    requests: list[dict[str, Any]] = [
        {"prompt": f"The {seed}th wheel turns, " * (1 + seed % 4), "seed": seed, "max_tokens": tokens + seed, "logprobs": 0}
        for seed in range(16)
    ]
    with Served(FLIPPING, tensor_parallel=ranks, draft=draft) as served:
        calm = await run(served.url, served.model, requests, ours=True)
        assert [one.error for one in calm] == [None] * len(requests)
        names = [f"worker-{number}" for number in range(ranks)]
        async with Streams(served.url, served.model, requests, ours=True) as streams:
            await streams.until(sum(one.pieces for one in calm) // 4)
            order(await asyncio.to_thread(served.run_dir), rank).touch()
            flipped = await asyncio.to_thread(served.until, r"a bit flips in step (\d+)")
            found = await asyncio.to_thread(served.until, rf"rank {rank} has ledger digest \w+ in step (\d+), the scheduler")
            assert found[1] == flipped[1]
            got = await streams.ended()
        assert differences(got, calm) == {}
        served.until_state("ready")
        served.until_empty()
        assert served.metric("headrace_divergences_total") == 1
        assert [served.metric("headrace_restarts_total", process=name) for name in names] == [1] * ranks
