"""What `scripts/gpu-check drafts` times: verification of trees of drafts, and moves of keys and values, at Llama-3-8B's sizes.

Milliseconds, of the host too, from what a step has to what it wants: medians of calls that wait for the device.
"""

from collections.abc import Callable, Iterator
from random import Random

import numpy as np
import torch

from headrace.kernels.triton import TritonBackend
from scripts.lib import gpu_times
from scripts.lib.gpu_times import Items, Run
from tests.kernels.draws import batch_of
from tests.kernels.trees import trees_of

LAYERS, PAGES, PAGE = 32, 512, 16
ROWS = 16
"""Of a tree."""


def drafts(run: Run) -> Items:
    """Each op for one request and for 32."""
    for requests in (1, 32):
        yield f"trees of {requests}", lambda requests=requests: measure(run.results.setdefault("drafts", []), trees(requests))
        yield f"moves of {requests}", lambda requests=requests: measure(run.results.setdefault("drafts", []), moves(requests))


def measure(rows: list[dict], works: Iterator[tuple[str, Callable[[], object]]]) -> None:
    for what, work in works:
        took = gpu_times.seconds(work, 12, 3) * 1e3
        rows.append({"what": what, "ms": took})
        print(f"  {what:60} {took:7.3f} ms", flush=True)


def trees(requests: int) -> Iterator[tuple[str, Callable[[], object]]]:
    backend, vocabulary = TritonBackend(str(gpu_times.DEVICE)), gpu_times.LLAMA_8B.vocab_size
    made = trees_of(Random(1), [ROWS] * requests, 50)
    rows = len(made.parents)
    tokens = torch.randint(0, 50, (rows,), device=gpu_times.DEVICE)
    yield f"verify, {requests} trees of {ROWS} rows, tokens on the device", lambda: backend.verify(made, tokens)
    on_host = tokens.tolist()
    yield f"verify, {requests} trees of {ROWS} rows, tokens on the host", lambda: backend.verify(made, on_host)
    logits = torch.randn(rows, vocabulary, device=gpu_times.DEVICE) * 3
    probabilities = (logits + torch.randn_like(logits)).softmax(1)
    for name, settings in (("plain", {}), ("top p 0.9", {"top_p": 0.9})):
        batch = batch_of(*({"seed": row} | settings for row in range(rows)))
        yield (
            f"rejection_sample, {requests} trees of {ROWS} rows, {name}",
            lambda batch=batch: backend.rejection_sample(logits, batch, made, probabilities),
        )


def moves(requests: int) -> Iterator[tuple[str, Callable[[], object]]]:
    backend, dice = TritonBackend(str(gpu_times.DEVICE)), np.random.default_rng(1)
    wait = torch.cuda.synchronize if gpu_times.DEVICE.type == "cuda" else lambda: None
    for kind in ("bf16", "int8"):
        kv = backend.new_kv(LAYERS, PAGES, PAGE, gpu_times.HEADS, kind)
        from_slots, to_slots = (dice.permutation(PAGES * PAGE)[: 4 * requests].astype(np.int32) for _ in range(2))
        pages = dice.permutation(PAGES)[: 8 * requests].astype(np.int32)
        rows = backend.gather_kv(kv, pages)
        yield f"copy_kv, {4 * requests} positions, {kind}", lambda a=(kv, from_slots, to_slots): (backend.copy_kv(*a), wait())
        yield f"gather_kv, {8 * requests} pages, {kind}", lambda a=(kv, pages): (backend.gather_kv(*a), wait())
        yield f"scatter_kv, {8 * requests} pages, {kind}", lambda a=(kv, pages, rows): (backend.scatter_kv(*a), wait())
