"""The real model through the real processes, asked by OpenAI's own client: every answer is right, and the same in any company.

    alone       each request by itself, on a quiet engine
    together    all of them at once
    elsewhere   all at once in an engine with other threads, small steps, hardly any KV memory and no prefix cache

All three must agree in every token and in every bit of every logprob.
"""

import asyncio
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.e2e.streams import Got, Streams, differences, run
from tests.serving import REAL, Served

FEW_PAGES = {"page_size": 8, "kv_memory": str(32 * 2 * 2 * 30 * 3 * 64 * 8)}
"""32 pages of 8 tokens of the default model: keys and values, float32, 30 layers, 3 heads of 64."""

TOPICS = [
    "the sea", "a lighthouse", "bread", "the moon", "an old clock", "winter", "a river", "chess", "a violin", "rain on tin roofs",
    "the first train", "honey", "a lost key", "mountains", "paper", "wind",
]  # fmt: skip


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def company() -> list[dict[str, Any]]:
    """32 requests, no two alike: chat and completions, greedy and seeded, with stops, penalties, biases and logprobs."""
    requests: list[dict[str, Any]] = []
    for place, topic in enumerate(TOPICS):
        chat: dict[str, Any] = {"messages": [{"role": "user", "content": f"Write one sentence about {topic}."}]}
        plain: dict[str, Any] = {"prompt": f"Notes on {topic}. " * (1 + place % 3) + "The most important thing is"}
        for request in (chat, plain):
            request["max_tokens"] = 6 + place % 4
            request["temperature"] = 0
        match place % 4:
            case 0:
                chat |= {"logprobs": True, "top_logprobs": 3}
                plain |= {"logprobs": 2}
            case 1:
                chat |= {"temperature": 0.8, "seed": place, "logprobs": True}
                plain |= {"temperature": 1.2, "seed": place, "top_p": 0.9, "extra_body": {"top_k": 40, "min_p": 0.02}}
            case 2:
                chat |= {"stop": [" of", " and"], "presence_penalty": 0.7, "frequency_penalty": 0.3}
                plain |= {"stop": ".", "logprobs": 0, "extra_body": {"repetition_penalty": 1.3}}
            case 3:
                chat |= {"logit_bias": {str(300 + place): 4}, "extra_body": {"min_tokens": 4}}
                plain |= {"temperature": 0.7, "seed": 2**40 + place, "logprobs": 1, "extra_body": {"ignore_eos": True}}
        requests += [chat, plain]
    return requests


@pytest.fixture(scope="module")
def alone(served) -> list[Got]:
    """What each of the company is answered by itself."""

    async def one_by_one() -> list[Got]:
        return [(await run(served.url, served.model, [request]))[0] for request in company()]

    return asyncio.run(one_by_one())


def test_the_capital_of_france_is_paris(client, served):
    answer = client.chat.completions.create(
        model=served.model, messages=[{"role": "user", "content": "What is the capital of Japan?"}], temperature=0, max_tokens=32
    )
    assert answer.choices[0].message.content == "The capital of Japan is Tokyo."
    assert answer.choices[0].finish_reason == "stop"


def test_every_answer_ends_as_it_should(alone):
    for request, got in zip(company(), alone, strict=True):
        assert got.error is None
        assert got.finish_reason in ("length", "stop")
        assert (got.completion_tokens == request["max_tokens"]) if got.finish_reason == "length" else got.completion_tokens
        for stop in [request.get("stop", [])] if isinstance(request.get("stop"), str) else request.get("stop", []):
            assert stop not in got.text
        if "logprobs" in request:
            assert len(got.logprobs) == got.completion_tokens
            assert all(-100 < logprob <= 0 for _, logprob in got.logprobs)
    assert len({got.text for got in alone}) == len(alone)
    assert sum(got.finish_reason == "stop" for got in alone) >= 3


async def test_32_at_once_are_answered_as_each_alone_to_the_last_bit(served, alone):
    assert differences(await run(served.url, served.model, company()), alone) == {}
    served.until_empty()


async def test_whole_answers_are_what_the_streams_add_up_to(served, alone):
    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60) as client:

        async def whole(request: dict[str, Any]) -> Got:
            if "messages" in request:
                answer = await client.chat.completions.create(model=served.model, **request)
                choice = answer.choices[0]
                scores = [(one.token, one.logprob) for one in choice.logprobs.content] if choice.logprobs else []
                return Got(choice.message.content, 0, choice.finish_reason, answer.usage.completion_tokens, scores)
            answer = await client.completions.create(model=served.model, **request)
            choice = answer.choices[0]
            scores = list(zip(choice.logprobs.tokens, choice.logprobs.token_logprobs, strict=True)) if choice.logprobs else []
            return Got(choice.text, 0, choice.finish_reason, answer.usage.completion_tokens, scores)

        assert differences(await asyncio.gather(*map(whole, company()[8:24])), alone[8:24]) == {}


async def test_streams_that_are_left_in_the_middle_change_nothing_for_the_others(served, alone):
    leavers = [{"prompt": f"{topic} " * 20, "max_tokens": 400, "extra_body": {"ignore_eos": True}} for topic in TOPICS[:4]]
    async with Streams(served.url, served.model, leavers) as gone:
        await gone.until(4)
        async with Streams(served.url, served.model, company()[:16]) as streams:
            await streams.until(10)
            await gone.__aexit__()
            got = await streams.ended()
    assert differences(got, alone[:16]) == {}
    served.until_empty(3)


async def test_in_another_engine_with_small_steps_few_pages_and_one_thread_all_is_the_same(served, alone):
    growing = [{"prompt": f"My {topic}", "max_tokens": 40, "seed": 3, "extra_body": {"ignore_eos": True}} for topic in TOPICS[:7]]
    grown = await run(served.url, served.model, growing)
    with Served(REAL, threads=1, max_step_tokens=48, prefix_cache=False, **FEW_PAGES) as other:
        assert differences(await run(other.url, other.model, company()), alone) == {}
        assert differences(await run(other.url, other.model, growing), grown) == {}
        assert other.metric("headrace_preemptions_total") > 0, "the pages were to be too few"
        assert other.metric("headrace_prefix_hit_tokens_total") == 0
        other.until_empty()


async def test_drafts_change_no_answer_and_spare_steps(served, alone):
    again = "one two three four five six seven eight nine ten, " * 4
    repeating = [
        {"prompt": again, "max_tokens": 60, "temperature": 0, "logprobs": 2},
        {"prompt": again, "max_tokens": 40, "temperature": 0.7, "seed": 5, "logprobs": 0},
        {"prompt": again, "max_tokens": 40, "temperature": 0, "frequency_penalty": 0.1, "stop": ["nine ten, one two"]},
        {"messages": [{"role": "user", "content": f"Repeat this: {again}"}], "max_tokens": 60, "temperature": 0, "logprobs": True},
    ]
    plain = [(await run(served.url, served.model, [request]))[0] for request in repeating]
    with Served(REAL, threads=2, draft="ngram") as other:
        assert differences([(await run(other.url, other.model, [request]))[0] for request in repeating], plain) == {}
        drafted, accepted = (other.metric(f"headrace_{name}_total") for name in ("draft_tokens", "accepted_draft_tokens"))
        assert drafted >= accepted > 60
        assert differences(await run(other.url, other.model, repeating + company()), plain + alone) == {}
        other.until_empty()


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"draft": "ngram"} | FEW_PAGES,
        {"threads": 1},
        {"threads": 3},
        {"max_step_tokens": 17},
        {"max_step_tokens": 2048},
        {"page_size": 64},
        {"max_running": 3},
        {"prefix_cache": False},
        FEW_PAGES,
        {"tokenizers": 2},
    ],
    ids=str,
)
async def test_no_setting_changes_an_answer(alone, settings):
    with Served(REAL, **{"threads": 2} | settings) as other:
        for _ in range(2):
            assert differences(await run(other.url, other.model, company()), alone) == {}
        other.until_empty()


@pytest.mark.slow
async def test_the_reference_kernels_give_the_same_answers_in_any_company():
    with Served(REAL, threads=1, kernels="reference", max_step_tokens=64) as other:
        few = company()[:8]
        alone = [(await run(other.url, other.model, [request]))[0] for request in few]
        assert differences(await run(other.url, other.model, few), alone) == {}


@pytest.mark.parametrize("exact", [pytest.param(True, marks=pytest.mark.slow), False], ids=["float32", "as served"])
async def test_a_few_words_from_the_reference_kernels_are_those_of_the_native_ones(exact):
    request = {"prompt": "The capital of France is", "temperature": 0, "max_tokens": 3, "logprobs": 0}
    numbers = {"activations": "f32", "kv_dtype": "f32"} if exact else {}
    with Served(REAL, threads=2, **numbers) as other:
        (native,) = await run(other.url, other.model, [request])
    with Served(REAL, threads=1, kernels="reference", **numbers) as other:
        got = await run(other.url, other.model, [request] * 2)
    assert differences(got, [got[0]] * 2) == {}
    assert got[0].text == native.text
    assert all(math.isclose(a, b, abs_tol=1e-3 if exact else 0.1) for (_, a), (_, b) in zip(got[0].logprobs, native.logprobs, strict=True))


async def test_a_prefix_hit_changes_nothing(served):
    prompt = "A long and winding introduction that nobody has read before: " + "words, words, words and " * 12
    request = {"prompt": prompt, "max_tokens": 12, "temperature": 0, "logprobs": 3}
    (cold,) = await run(served.url, served.model, [request])
    before = served.metric("headrace_prefix_hit_tokens_total")
    (warm,) = await run(served.url, served.model, [request])
    assert served.metric("headrace_prefix_hit_tokens_total") >= before + 48
    assert differences([warm], [cold]) == {}


async def test_a_seed_gives_its_tokens_again_and_another_seed_others(served):
    prompts = [{"prompt": "My favourite animal is", "max_tokens": 12, "temperature": 1.0, "seed": seed} for seed in (1, 1, 2, 3, 4)]
    first, again, *others = [one.text for one in await run(served.url, served.model, prompts)]
    assert first == again
    assert len({first, *others}) == 4


# Scores


def test_the_scores_of_an_echoed_prompt_are_those_its_tokens_had_when_they_were_chosen(client, served):
    prompt = served.ask("/tokenize", {"prompt": "The quick brown fox jumps over"})[1]["tokens"]
    made = client.completions.create(
        model=served.model, prompt=prompt, max_tokens=20, temperature=0, logprobs=2, extra_body={"ignore_eos": True}
    ).choices[0]
    tokens = prompt + served.ask("/tokenize", {"prompt": made.text, "add_special_tokens": False})[1]["tokens"]
    assert len(tokens) == len(prompt) + 20, "the text was to be tokenized as it was made"
    echoed = client.completions.create(model=served.model, prompt=tokens, max_tokens=0, echo=True, logprobs=2).choices[0]
    assert echoed.text.endswith(made.text)
    assert echoed.logprobs.tokens[len(prompt) :] == made.logprobs.tokens
    assert echoed.logprobs.token_logprobs[len(prompt) :] == made.logprobs.token_logprobs
    assert echoed.logprobs.top_logprobs[len(prompt) :] == made.logprobs.top_logprobs
    assert sum(echoed.logprobs.token_logprobs[len(prompt) :]) == sum(made.logprobs.token_logprobs)


def likelihoods(answer: dict[str, Any], contexts: list[int]) -> list[tuple[float, bool]]:
    """(log-likelihood, is greedy) of each continuation, read from an answer as lm-evaluation-harness reads it: by index, from the end of
    the context to the last prompt token, greedy when every token's logprob is the greatest of its place."""
    found = []
    for choice, context in zip(sorted(answer["choices"], key=lambda choice: choice["index"]), contexts, strict=True):
        own = choice["logprobs"]["token_logprobs"][context:-1]
        top = choice["logprobs"]["top_logprobs"][context:-1]
        found.append((sum(own), all(one == max(others.values()) for one, others in zip(own, top, strict=True))))
    return found


def test_lm_evaluation_harness_can_choose_between_continuations(served):
    questions = {
        "The capital of France is": (" Paris", " a potato", " Berlin"),
        "Two plus two equals": (" four", " eleven hundred", " cheese"),
    }
    pairs = [(context, ending) for context, endings in questions.items() for ending in endings]
    ids = [[served.ask("/tokenize", {"prompt": text})[1]["tokens"] for text in (context, context + ending)] for context, ending in pairs]
    body = {"model": served.model, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}

    def ask(prompts: list[list[int]]) -> dict[str, Any]:
        status, answer = served.ask("/v1/completions", body | {"prompt": prompts}, {"Authorization": "Bearer "})
        assert status == 200, answer
        return answer

    batch = ask([whole for _, whole in ids])
    contexts = [len(context) for context, _ in ids]
    found = likelihoods(batch, contexts)
    for choice, (_, whole) in zip(batch["choices"], ids, strict=True):
        scores = choice["logprobs"]
        assert len(scores["token_logprobs"]) == len(scores["top_logprobs"]) == len(scores["tokens"]) == len(whole) + 1
        assert scores["token_logprobs"][0] is None
    assert found == [likelihoods(ask([whole]), [context])[0] for (_, whole), context in zip(ids, contexts, strict=True)]
    by_pair = dict(zip(pairs, found, strict=True))
    for context, endings in questions.items():
        assert max(endings, key=lambda ending: by_pair[context, ending][0]) == endings[0]
    assert by_pair["The capital of France is", " Paris"][1], "what the model would say by itself"
    assert not by_pair["The capital of France is", " a potato"][1]


def test_a_score_has_every_prompt_token_even_when_the_model_would_end_there(served):
    """The harness drops the last score, taking it for the one generated token's: so there must be one, end token or not."""
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = served.ask("/tokenize", {"messages": messages})[1]["tokens"]
    prompt += served.ask("/tokenize", {"prompt": "The capital of France is Paris.", "add_special_tokens": False})[1]["tokens"]
    body = {"prompt": [prompt], "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    choice = served.ask("/v1/completions", body)[1]["choices"][0]
    assert choice["finish_reason"] == "stop"
    scores = choice["logprobs"]
    assert len(scores["token_logprobs"]) == len(scores["top_logprobs"]) == len(scores["tokens"]) == len(prompt) + 1
    without = served.ask("/v1/completions", body | {"max_tokens": 0})[1]["choices"][0]["logprobs"]
    assert without["token_logprobs"] == scores["token_logprobs"][:-1]


def test_lm_evaluation_harness_can_let_it_write(served):
    prompts = [served.ask("/tokenize", {"prompt": text})[1]["tokens"] for text in ("Question: 1+1?\nAnswer:", "Roses are red,")]
    body = {"model": served.model, "prompt": prompts, "max_tokens": 12, "temperature": 0, "stop": ["\n\n", "<|endoftext|>"], "seed": 1234}
    status, answer = served.ask("/v1/completions", body)
    assert status == 200, answer
    texts: list[str | None] = [None, None]
    for choice in answer["choices"]:
        texts[choice["index"]] = choice["text"]
    assert all(texts)
    assert not any(stop in text for text in texts if text for stop in body["stop"])


def test_long_prompts_are_scored_whole_in_chunks(client, served):
    ids = served.ask("/tokenize", {"prompt": "It was the best of times, it was the worst of times. " * 42})[1]["tokens"]
    assert len(ids) > 512, "more than a step takes"
    scores = client.completions.create(model=served.model, prompt=ids, max_tokens=0, echo=True, logprobs=1).choices[0].logprobs
    assert len(scores.token_logprobs) == len(ids)
    assert None not in scores.token_logprobs[1:]
    assert sum(scores.token_logprobs[-100:]) > sum(scores.token_logprobs[1:101]), "a text that repeats itself becomes likely"


def test_the_synchronous_client_from_many_threads(client, served, alone):
    requests = company()[::4]
    barrier = threading.Barrier(len(requests))

    def ask(request: dict[str, Any]) -> str:
        barrier.wait()
        return client.chat.completions.create(model=served.model, **request).choices[0].message.content

    with ThreadPoolExecutor(len(requests)) as pool:
        assert list(pool.map(ask, requests)) == [got.text for got in alone[::4]]
