"""A sequence's hidden states and logits are the same to the last bit, however its tokens were brought to the decoder."""

import random

import pytest
import torch

from headrace.workers.loader.safetensors import SafetensorsCheckpoint
from tests.workers.model.drive import KERNELS, Drive, Loaded, load
from tests.workers.model.tiny import build

TEXT = torch.randint(3, 199, (150,), generator=torch.Generator().manual_seed(6)).tolist()
WIDTH = 32
MODELS: list = [(name, kernels) for kernels in KERNELS for name in ("llama-one-kv-head", "gemma3")]
MODELS += [("qwen3-moe", "cpu"), pytest.param(("qwen3-moe", "reference"), marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=MODELS, ids="-".join)
def loader(request, tmp_path_factory):
    """Loads a tiny model for a number of threads."""
    name, kernels = request.param
    directory = tmp_path_factory.mktemp(name)
    model = build(name, directory)
    return lambda threads: load(kernels, model.config.architectures[0], SafetensorsCheckpoint(directory), 256, threads)


@pytest.fixture(scope="module")
def loaded(loader) -> Loaded:
    return loader(None)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def logits(loaded: Loaded, chunks: list[int], shuffle: int | None = None) -> torch.Tensor:
    """Logits of TEXT, brought in pieces of the given sizes, repeated in turn."""
    drive, parts, begin = Drive(loaded, shuffle=shuffle), [], 0
    while begin < len(TEXT):
        piece = TEXT[begin : begin + chunks[len(parts) % len(chunks)]]
        parts.append(drive.step([(0, piece)])[0])
        begin += len(piece)
    return torch.cat(parts)


def test_chunks_of_any_size_give_what_the_whole_prompt_gives(loaded):
    whole = logits(loaded, [len(TEXT)])
    assert torch.equal(logits(loaded, [7]), whole)
    assert torch.equal(logits(loaded, [100, 1, 1, 1, 29, 2]), whole)


def test_page_order_and_threads_change_nothing(loader):
    one = loader(1)
    whole = logits(one, [len(TEXT)])
    assert torch.equal(logits(one, [40], shuffle=3), whole)
    for count in (2, 3):
        more = loader(count)
        assert torch.equal(logits(more, [len(TEXT)]), whole)
        assert torch.equal(logits(more, [50]), whole)


def test_a_sequence_among_32_others_in_any_order_gives_what_it_gives_alone(loaded):
    alone = logits(loaded, [10])
    dice = random.Random(1)
    drive = Drive(loaded, sequences=WIDTH, shuffle=2)
    parts = []
    for begin in range(0, len(TEXT), 10):
        # prefills, chunks and single tokens side by side; TEXT is sequence 5
        work = [(5, TEXT[begin : begin + 10])]
        work += [(s, [dice.randrange(3, 199) for _ in range(dice.choice([1, 1, 1, 4, 16]))]) for s in range(WIDTH) if s != 5]
        dice.shuffle(work)
        index = next(i for i, (sequence, _) in enumerate(work) if sequence == 5)
        parts.append(drive.step(work)[index])
    assert torch.equal(torch.cat(parts), alone)
