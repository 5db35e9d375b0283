"""The endpoint as OpenAI's own client sees it."""

import json

import openai
import pytest

HELLO = [{"role": "user", "content": "hello"}]


def text_of(chunks) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_a_chat_answer_has_text_reason_and_counts(client, served):
    answer = client.chat.completions.create(model=served.model, messages=HELLO, max_tokens=7, seed=5)
    (choice,) = answer.choices
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == served.model
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason == "length"
    assert answer.usage.completion_tokens == 7
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 7


def test_a_stream_gives_the_same_text_as_the_whole_answer(client, served):
    fields = {"model": served.model, "messages": HELLO, "max_tokens": 40, "seed": 6}
    whole = client.chat.completions.create(**fields)
    chunks = list(client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert text_of(chunks) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.model_dump(exclude={"prompt_tokens_details"}) == whole.usage.model_dump(exclude={"prompt_tokens_details"})
    assert len(chunks) > 4, "it comes in many pieces, however busy the machine is"


def test_without_include_usage_no_chunk_speaks_of_usage(client, served):
    chunks = list(client.chat.completions.create(model=served.model, messages=HELLO, max_tokens=3, stream=True))
    assert all(chunk.usage is None for chunk in chunks)
    assert all(chunk.choices for chunk in chunks)


def test_the_same_seed_gives_the_same_choices_and_n_gives_different_ones(client, served):
    fields = {"model": served.model, "messages": HELLO, "max_tokens": 8, "n": 3, "seed": 11}
    first, second = (client.chat.completions.create(**fields) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in second.choices]
    assert len(set(texts)) == 3
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert first.usage.completion_tokens == 24


def test_streamed_choices_are_told_apart_by_index(client, served):
    fields = {"model": served.model, "messages": HELLO, "max_tokens": 8, "n": 3, "seed": 11}
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(**fields, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [choice.message.content for choice in client.chat.completions.create(**fields).choices]


def test_a_stop_string_ends_the_text_before_it_even_across_tokens(client, served):
    fields = {"model": served.model, "prompt": "hello", "max_tokens": 30, "seed": 3}
    text = client.completions.create(**fields).choices[0].text
    stop = text[len(text) // 2 - 3 : len(text) // 2 + 4]
    cut = text[: text.index(stop)]
    answer = client.completions.create(**fields, stop=["never there", stop])
    assert answer.choices[0].text == cut
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].stop_reason == stop
    assert 0 < answer.usage.completion_tokens < 30
    chunks = list(client.completions.create(**fields, stop=stop, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == cut
    kept = client.completions.create(**fields, stop=stop, extra_body={"include_stop_str_in_output": True})
    assert kept.choices[0].text == cut + stop


def test_a_stop_token_id_ends_the_answer(client, served):
    fields = {"model": served.model, "prompt": "hello", "max_tokens": 10, "seed": 3}
    scored = client.completions.create(**fields, logprobs=0)
    token = served.ask("/tokenize", {"prompt": scored.choices[0].logprobs.tokens[4]})[1]["tokens"][0]
    answer = client.completions.create(**fields, extra_body={"stop_token_ids": [token]})
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].stop_reason == token
    assert answer.usage.completion_tokens <= 5


def test_prompts_may_be_strings_ids_or_lists_of_either(client, served):
    ids = served.ask("/tokenize", {"prompt": "hello there"})[1]["tokens"]
    for prompt, count in (("hello there", 1), (ids, 1), (["hello there", "more"], 2), ([ids, ids, [5]], 3)):
        answer = client.completions.create(model=served.model, prompt=prompt, max_tokens=4, seed=9)
        assert [choice.index for choice in answer.choices] == list(range(count))
        assert len({choice.text for choice in answer.choices}) == 1, "the fake worker knows only the seed"


def test_n_and_a_list_of_prompts_number_choices_prompt_by_prompt(client, served):
    answer = client.completions.create(model=served.model, prompt=["a", "b"], n=2, max_tokens=3, seed=1, echo=True)
    assert [choice.text[0] for choice in answer.choices] == ["a", "a", "b", "b"]
    assert answer.usage.prompt_tokens == 2
    assert answer.usage.completion_tokens == 12


def test_echo_with_logprobs_scores_the_prompt_even_without_output(client, served):
    answer = client.completions.create(model=served.model, prompt="hello there you", max_tokens=0, echo=True, logprobs=1)
    (choice,) = answer.choices
    assert choice.text == "hello there you"
    scores = choice.logprobs
    assert "".join(scores.tokens) == choice.text
    assert scores.token_logprobs[0] is None
    assert all(isinstance(one, float) for one in scores.token_logprobs[1:])
    assert [choice.text[at : at + len(token)] for at, token in zip(scores.text_offset, scores.tokens, strict=True)] == scores.tokens
    assert answer.usage.completion_tokens == 0


def test_echo_with_logprobs_streams_the_same(client, served):
    fields = {"model": served.model, "prompt": "hello there you", "max_tokens": 5, "echo": True, "logprobs": 1, "seed": 2}
    whole = client.completions.create(**fields).choices[0]
    chunks = [chunk.choices[0] for chunk in client.completions.create(**fields, stream=True)]
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert [token for chunk in chunks if chunk.logprobs for token in chunk.logprobs.tokens] == whole.logprobs.tokens
    assert [at for chunk in chunks if chunk.logprobs for at in chunk.logprobs.text_offset] == whole.logprobs.text_offset


def test_chat_logprobs_have_a_token_each_with_its_bytes(client, served):
    fields = {"model": served.model, "messages": HELLO, "max_tokens": 6, "seed": 4, "logprobs": True, "top_logprobs": 2}
    answer = client.chat.completions.create(**fields)
    content = answer.choices[0].logprobs.content
    assert len(content) == 6
    assert b"".join(bytes(one.bytes) for one in content).decode() == answer.choices[0].message.content
    streamed = [chunk.choices[0].logprobs for chunk in client.chat.completions.create(**fields, stream=True)]
    assert [one.token for part in streamed if part for one in part.content] == [one.token for one in content]


def test_the_models_list_names_the_one_that_is_served(client, served):
    assert [model.id for model in client.models.list()] == [served.model]
    assert client.models.retrieve(served.model).max_model_len == 8192
    with pytest.raises(openai.NotFoundError, match="nope"):
        client.models.retrieve("nope")


def test_text_survives_the_way_to_ids_and_back(served):
    for text in ("hello", "Grüße aus 東京 🙂", "  two  spaces\n\tand a tab"):
        tokens = served.ask("/tokenize", {"prompt": text})[1]
        assert tokens["count"] == len(tokens["tokens"])
        assert served.ask("/detokenize", {"tokens": tokens["tokens"]})[1] == {"prompt": text}
    chat = served.ask("/tokenize", {"messages": HELLO, "return_token_strs": True})[1]
    assert len(chat["token_strs"]) == chat["count"] > 3


def test_the_request_id_is_in_the_header_and_in_the_body(client, served):
    raw = client.chat.completions.with_raw_response.create(model=served.model, messages=HELLO, max_tokens=1)
    assert raw.headers["x-request-id"] == json.loads(raw.text)["id"]


def test_a_rejected_stream_is_a_plain_error_and_not_a_broken_stream(client, served):
    with pytest.raises(openai.BadRequestError, match="exceeds the context of 8192") as caught:
        client.completions.create(model=served.model, prompt=[5] * 9000, stream=True, max_tokens=5)
    assert caught.value.code == "context_length_exceeded"
