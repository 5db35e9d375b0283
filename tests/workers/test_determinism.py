"""The same tokens, always: a request's answer is the same to the last bit of every logprob, however an engine comes to compute it.

What it is alone, in an engine of its own without a cache or drafts, is the measure of every other way.
"""

import random

import pytest

from headrace.engine.messages.sampling import Sampling
from headrace.workers.loader.gguf import GGUFCheckpoint
from headrace.workers.loader.safetensors import SafetensorsCheckpoint
from tests.workers.company import Answer, Company, Request
from tests.workers.model.drive import Loaded, load
from tests.workers.model.test_default_model import model_file
from tests.workers.model.tiny import build

WAYS = {
    "a batch of 64": {"max_running": 64},
    "steps of 16 tokens": {"max_step_tokens": 16},
    "steps of 64 tokens": {"max_step_tokens": 64},
    "steps of 256 tokens": {"max_step_tokens": 256},
    "one plan in flight": {"ahead": False},
    "no cache": {"prefix_cache": False},
    "small pages": {"page_size": 8, "pages": 2048},
    "drafts": {"draft": "ngram"},
    "drafts, one plan in flight, steps of 16 tokens": {"draft": "ngram", "ahead": False, "max_step_tokens": 16},
}


def requests(count: int, vocabulary: int, tokens: int) -> list[Request]:
    """Prompts of all lengths, a third of them with a long common beginning, a third that repeat themselves; greedy and sampled in turn."""
    dice = random.Random(count)
    common = [dice.randrange(3, vocabulary) for _ in range(37)]
    found = []
    for place in range(count):
        prompt = [dice.randrange(3, vocabulary) for _ in range(dice.choice([1, 2, 5, 16, 17, 40]))]
        match place % 3:
            case 1:
                prompt = common[: dice.choice([16, 31, 37])] + prompt
            case 2:
                prompt = (prompt[:5] * 12)[:45]
        sampling = {
            0: {"temperature": 0.0},
            1: {"temperature": 0.9, "top_p": 0.95},
            2: {"temperature": 0.0, "frequency_penalty": 0.4},
            3: {"temperature": 1.3, "top_k": 30, "min_p": 0.01, "repetition_penalty": 1.1},
            4: {"temperature": 0.0},
        }[place % 5]
        found.append(Request(tuple(prompt), Sampling(max_tokens=tokens + place % 5, logprobs=place % 4, **sampling), dice.getrandbits(63)))
    return found


def alone(loaded: Loaded, asked: list[Request]) -> list[Answer]:
    company = Company(loaded, prefix_cache=False, max_running=1)
    return [company.ask([request])[0] for request in asked]


class Suite:
    """A model, requests, and what each of them is owed."""

    def __init__(self, loaded: Loaded, asked: list[Request]) -> None:
        self.loaded = loaded
        self.asked = asked
        self.owed = alone(loaded, asked)
        assert len({tuple(answer.tokens) for answer in self.owed}) > 0.9 * len(asked)

    def check(self, answers: list[Answer]) -> None:
        for place, (answer, owed) in enumerate(zip(answers, self.owed, strict=True)):
            assert answer == owed, f"request {place}, {self.asked[place]}"


@pytest.fixture(
    scope="module",
    params=["llama", "gemma3", pytest.param("reference", marks=pytest.mark.slow), pytest.param("default", marks=pytest.mark.slow)],
)
def suite(request, tmp_path_factory) -> Suite:
    """Of tiny models of 64 requests; of the default model 200."""
    if request.param == "default":
        return Suite(load("cpu", "llama", GGUFCheckpoint(model_file()), 1024), requests(200, 49_000, 6))
    directory = tmp_path_factory.mktemp(request.param)
    kernels, name = ("reference", "llama") if request.param == "reference" else ("cpu", request.param)
    model = build(name, directory)
    loaded = load(kernels, model.config.architectures[0], SafetensorsCheckpoint(directory), 256)
    return Suite(loaded, requests(64, 199, 8))


@pytest.mark.parametrize("way", WAYS)
def test_an_answer_is_the_same_among_others_by_any_way_with_a_cold_cache_and_a_warm_one(suite, way):
    company = Company(suite.loaded, **WAYS[way])
    suite.check(company.ask(suite.asked))
    cold = company.cached
    suite.check(company.ask(suite.asked))
    assert (company.cached > 2 * cold) == (way != "no cache")
    assert (company.right > 0) == ("drafts" in way)


def test_an_answer_is_the_same_though_its_request_had_to_give_up_its_pages(suite):
    company = Company(suite.loaded, pages=14, page_size=8)
    suite.check(company.ask(suite.asked))
    assert company.ear.preemptions > 0


@pytest.mark.parametrize("draft", ["none", "ngram"])
def test_an_answer_is_the_same_though_its_worker_died_in_between(suite, draft):
    company = Company(suite.loaded, draft=draft)
    suite.check(company.ask(suite.asked, kill_after=(1, 150, 151, 400)))


def test_an_answer_is_the_same_through_deaths_preemptions_drafts_and_small_steps_together(suite):
    company = Company(suite.loaded, pages=14, page_size=8, draft="ngram", max_step_tokens=40)
    suite.check(company.ask(suite.asked, kill_after=(90, 300)))
    assert company.ear.preemptions > 0
