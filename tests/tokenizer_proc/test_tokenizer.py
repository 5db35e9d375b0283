"""The tokenizer's actor over real sockets: requests in, text out, exactly one last word each."""

import json

import pytest

from headrace.engine.messages.frontend import (
    Abort,
    Accepted,
    CallFailed,
    ChatPrompt,
    Describe,
    Detokenize,
    Detokenized,
    End,
    Failed,
    ModelCard,
    PromptScores,
    Text,
    TextPrompt,
    Tokenize,
    Tokenized,
    TokenPrompt,
)
from headrace.engine.messages.lifecycle import Drain, PeerDied
from headrace.engine.messages.sampling import Sampling
from headrace.engine.messages.tokens import Cancel, Moved, PromptLogprobs, Refused, SchedulerUp, Submit, TokenEnd, TokenLogprobs, Tokens
from headrace.tokenizer_proc import tokenizer as module
from headrace.tokenizer_proc.chat import ChatTemplates
from tests.tokenizer_proc import samples
from tests.tokenizer_proc.stage import Stage

EOS = 2


@pytest.fixture
async def open_stage(tmp_path):
    stages = []

    def start(*arguments, **named) -> Stage:
        stages.append(Stage(tmp_path, *arguments, **named))
        return stages[-1]

    yield start
    for stage in stages:
        await stage.close()


@pytest.fixture
async def stage(open_stage):
    return open_stage()


def chat(*contents: str) -> ChatPrompt:
    return ChatPrompt(json.dumps([{"role": "user", "content": content} for content in contents]).encode())


# Prompts


async def test_a_prompt_is_submitted_as_ids_with_max_tokens_resolved(stage):
    stage.frontend.generate(7, 8, prompt="Hello world! 123", temperature=0.0, tenant="t", priority=3, seeds=(70, 80))
    first, second = await stage.submitted(2)
    assert (first.request, first.seed, first.tenant, first.priority, first.reply_to) == (7, 70, "t", 3, "tokenizer-0")
    assert (second.request, second.seed) == (8, 80)
    assert first.prompt == second.prompt == [19556, 905, 17, 216, 33, 34, 35]
    assert first.sampling == Sampling(max_tokens=8192 - 7, temperature=0.0)
    assert await stage.frontend.next(Accepted, 2) == [Accepted(7, 7), Accepted(8, 7)]


async def test_the_prompts_text_and_ids_are_told_when_they_are_wanted(stage):
    stage.frontend.generate(1, prompt="Hi", want_prompt=True)
    stage.frontend.generate(2, prompt=TokenPrompt((19556, 905)), want_prompt=True, max_tokens=0)
    stage.frontend.generate(3, prompt=chat("yes"), want_prompt=True)
    accepted = await stage.frontend.next(Accepted, 3)
    assert accepted[0] == Accepted(1, 1, "Hi", stage.encode("Hi"))
    assert accepted[1] == Accepted(2, 2, "Hello world", [19556, 905])
    assert accepted[2].prompt_text.endswith("<|im_start|>user\nyes<|im_end|>\n<|im_start|>assistant\n")
    assert accepted[2].prompt_ids[0] == 1 and accepted[2].prompt_ids.count(1) == 3
    assert [submit.sampling.max_tokens for submit in await stage.submitted(3)][1] == 0


async def test_a_rendered_conversation_gets_no_second_bos(open_stage):
    tokenizer = samples.from_metadata(samples.sentencepiece_metadata())
    templates = ChatTemplates({"default": "{{ bos_token }}{{ messages[0].content }}"}, {"bos_token": "<s>"})
    stage = open_stage(tokenizer, templates)
    stage.frontend.generate(1, prompt=chat("the cat"))
    stage.frontend.generate(2, prompt="the cat")
    chatted, raw = await stage.submitted(2)
    assert chatted.prompt == raw.prompt and raw.prompt.count(1) == 1


@pytest.mark.parametrize(
    ("fields", "said", "code", "param"),
    [
        (
            {"prompt": TokenPrompt((5,) * 9000)},
            "prompt of 9000 tokens exceeds the context of 8192: shorten it to at most 8191",
            "context_length_exceeded",
            "prompt",
        ),
        (
            {"prompt": TokenPrompt((5,) * 512), "max_tokens": 9000},
            "max_tokens=9000 exceeds the context of 8192 (prompt 512): ask for at most 7680",
            "context_length_exceeded",
            "max_tokens",
        ),
        ({"prompt": chat("a " * 9000)}, "exceeds the context of 8192", "context_length_exceeded", "messages"),
        ({"prompt": ""}, "the prompt has no tokens", "invalid_value", "prompt"),
        (
            {"prompt": TokenPrompt((5, 49152))},
            "prompt has token id 49152, the vocabulary has ids from 0 to 49151",
            "invalid_value",
            "prompt",
        ),
        ({"stop_token_ids": (-4,)}, "stop_token_ids has token id -4", "invalid_value", "stop_token_ids"),
        ({"logit_bias": ((60000, 1.0),)}, "logit_bias has token id 60000", "invalid_value", "logit_bias"),
        ({"stop": ("x", "")}, "stop has an empty string", "invalid_value", "stop"),
        ({"emitted": ((1,), (50000,))}, "emitted has token id 50000", "invalid_value", "emitted"),
        ({"seeds": (1,)}, "2 requests need as many different ids and seeds", "invalid_value", "n"),
        ({"prompt": ChatPrompt(b"[]")}, "messages is empty", "invalid_value", "messages"),
    ],
)
async def test_what_does_not_fit_the_model_fails_once_for_each_id(stage, fields, said, code, param):
    stage.frontend.generate(1, 2, **fields)
    for failed in await stage.frontend.ended(1, 2):
        assert isinstance(failed, Failed) and said in failed.message
        assert (failed.status, failed.code, failed.param) == (400, code, param)
    assert stage.forgotten() and not stage.scheduler.messages


async def test_a_model_without_a_template_says_so(open_stage):
    stage = open_stage(templates=ChatTemplates({}, {}))
    stage.frontend.generate(1, prompt=chat("hi"))
    (failed,) = await stage.frontend.ended(1)
    assert failed.status == 400 and "/v1/completions" in failed.message


async def test_a_fault_in_one_request_is_its_own(stage, monkeypatch):
    def broken(*_):
        raise RuntimeError("boom")

    monkeypatch.setattr(stage.tokenizer, "encode", broken)
    stage.frontend.generate(1)
    (failed,) = await stage.frontend.ended(1)
    assert (failed.status, failed.code) == (500, "internal_error")
    monkeypatch.undo()
    stage.frontend.generate(2)
    await stage.submitted()


# Text


async def test_tokens_become_text_and_the_end_token_counts_without_text(stage):
    stage.frontend.generate(1, prompt="Hello", skip_special_tokens=False)
    await stage.submitted()
    ids = stage.encode(" wörld 👋")
    stage.emit(1, ids)
    stage.emit(1, [EOS], len(ids), end="stop")
    (end,) = await stage.frontend.ended(1)
    assert stage.frontend.texts[1] == " wörld 👋"
    assert stage.frontend.tokens[1] == [*ids, EOS]
    assert end == End(1, "stop", None, 1, len(ids) + 1, 3, 0.25, 1)
    assert stage.forgotten()


async def test_a_stop_token_is_named_and_is_no_text(stage):
    stage.frontend.generate(1, stop_token_ids=(905,))
    await stage.submitted()
    stage.emit(1, [19556, 905], end="stop", stop_token=905)
    (end,) = await stage.frontend.ended(1)
    assert (end.reason, end.stop, end.completion_tokens) == ("stop", 905, 2)
    assert stage.frontend.texts[1] == "Hello"


async def test_an_end_token_that_does_not_end_the_request_is_text_when_asked_for(stage):
    stage.frontend.generate(1, ignore_eos=True, skip_special_tokens=False)
    stage.frontend.generate(2, ignore_eos=True)
    await stage.submitted(2)
    for request in (1, 2):
        stage.emit(request, [19556, EOS, 905], end="length")
    await stage.frontend.ended(1, 2)
    assert stage.frontend.texts == {1: "Hello<|im_end|> world", 2: "Hello world"}


async def test_half_a_character_at_the_end_is_dropped(stage):
    stage.frontend.generate(1)
    await stage.submitted()
    ids = stage.encode("a👩")
    stage.emit(1, ids[:-1], end="length")
    (end,) = await stage.frontend.ended(1)
    assert stage.frontend.texts[1] == "a"
    assert (end.reason, end.completion_tokens) == ("length", len(ids) - 1)


async def test_a_burst_of_steps_is_one_message_for_each_frontend(stage):
    other = stage.visit(b"server-1")
    stage.frontend.generate(1, 2)
    other.generate(3)
    await stage.submitted(3)
    await other.next(Accepted)
    for step in range(5):
        stage.actor.receive(Tokens(1, step, [1, 2, 3], [step] * 3, [19556, 905, 28]))
    stage.actor.settle()
    (text,) = await stage.frontend.next(Text)
    assert (text.requests, text.texts, text.counts) == ([1, 2], ["Hello" * 5, " world" * 5], [5, 5])
    assert text.tokens == [19556] * 5 + [905] * 5
    (text,) = await other.next(Text)
    assert (text.requests, text.texts) == ([3], [",,,,,"])


async def test_a_prompt_of_a_sentencepiece_model_is_continued_with_its_space(open_stage):
    stage = open_stage(samples.from_metadata(samples.sentencepiece_metadata()))
    stage.frontend.generate(1, prompt="the cat")
    (submit,) = await stage.submitted()
    ids = stage.encode("sat on")
    stage.emit(1, ids, end="length")
    await stage.frontend.ended(1)
    assert stage.frontend.texts[1] == " sat on"
    assert stage.tokenizer.decode(submit.prompt + ids, True) == "the cat sat on"


# Stop strings


async def test_a_stop_string_ends_the_request_in_the_text_and_at_the_scheduler(stage):
    stage.frontend.generate(1, stop=("the End", "never"))
    await stage.submitted()
    ids = stage.encode("This is the End of it")
    match = next(count for count in range(len(ids)) if "the End" in stage.tokenizer.decode(ids[:count]))
    for index, token in enumerate(ids):
        stage.emit(1, [token], index)
    (cancel,) = await stage.cancelled()
    assert (cancel.requests, cancel.reason) == ((1,), "stop")
    assert 1 not in stage.frontend.last_words
    stage.tell(Tokens(1, 9, [], [], [], ends=[TokenEnd(1, "stop", None, 5, 0.5, 0)]))
    (end,) = await stage.frontend.ended(1)
    assert end == End(1, "stop", "the End", 1, match, 5, 0.5, 0)
    assert stage.frontend.texts[1] == "This is "
    assert stage.frontend.tokens[1] == ids[:match]
    assert stage.forgotten()


async def test_a_stop_string_in_the_last_token_needs_no_cancel(stage):
    stage.frontend.generate(1, stop=("End",), include_stop=True)
    await stage.submitted()
    ids = stage.encode("the End")
    stage.emit(1, ids, end="length")
    (end,) = await stage.frontend.ended(1)
    assert (end.reason, end.stop, end.completion_tokens) == ("stop", "End", len(ids))
    assert stage.frontend.texts[1] == "the End"
    assert not stage.scheduler.of(module.Cancel)


async def test_text_held_for_a_stop_string_is_shown_when_the_request_ends_without_it(stage):
    stage.frontend.generate(1, stop=("the End",))
    await stage.submitted()
    stage.emit(1, stage.encode("This is the"))
    await stage.frontend.next(Text)
    assert stage.frontend.texts[1] == "This is "
    stage.emit(1, [EOS], len(stage.encode("This is the")), end="stop")
    await stage.frontend.ended(1)
    assert stage.frontend.texts[1] == "This is the"


async def test_no_stop_string_is_looked_for_among_the_first_min_tokens(stage):
    stage.frontend.generate(1, stop=(" world",), min_tokens=2)
    await stage.submitted()
    stage.emit(1, [19556, 905, 19556, 905])
    await stage.cancelled()
    stage.emit(1, [], end="stop")
    (end,) = await stage.frontend.ended(1)
    assert stage.frontend.texts[1] == "Hello worldHello"
    assert end.completion_tokens == 4


# Scores


async def test_scores_come_with_the_tokens_they_belong_to(stage):
    stage.frontend.generate(1, logprobs=1)
    await stage.submitted()
    ids = stage.encode("a👩")
    scores = [TokenLogprobs(1, place, -0.5 * place, (905,), (-0.1,)) for place in range(len(ids))]
    stage.emit(1, ids, end="length", logprobs=scores)
    await stage.frontend.ended(1)
    got = stage.frontend.scores[1]
    assert [score.token for score in got] == ids
    assert b"".join(score.bytes for score in got) == "a👩".encode()
    assert got[1].text.endswith("\ufffd")
    assert got[1].top == ((905, " world", b" world", -0.1),)
    assert [score.logprob for score in got] == [-0.5 * place for place in range(len(ids))]


async def test_scores_stop_where_the_stop_string_does(stage):
    stage.frontend.generate(1, logprobs=0, stop=(" world",))
    await stage.submitted()
    scores = [TokenLogprobs(1, place, -1.0) for place in range(3)]
    stage.emit(1, [19556, 905, 28], end="length", logprobs=scores)
    (end,) = await stage.frontend.ended(1)
    assert end.completion_tokens == len(stage.frontend.scores[1]) == 2


async def test_prompt_scores_come_whole_and_before_the_end(stage):
    stage.frontend.generate(1, prompt="Hello world! 123", prompt_logprobs=0, max_tokens=0)
    (submit,) = await stage.submitted()
    stage.tell(Tokens(1, 1, [], [], [], prompt_logprobs=[PromptLogprobs(1, 1, [-1.0, -2.0], [(), ()], [(), ()])]))
    rest = PromptLogprobs(1, 3, [-3.0, -4.0, -5.0, -6.0], [(905,)] * 4, [(-0.5,)] * 4)
    stage.emit(1, [], end="length", prompt_logprobs=[rest])
    (end,) = await stage.frontend.ended(1)
    assert end.completion_tokens == 0
    (message,) = stage.frontend.of(PromptScores)
    assert message.scores[0] is None
    assert [score.token for score in message.scores[1:]] == submit.prompt[1:]
    assert [score.logprob for score in message.scores[1:]] == [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0]
    assert message.scores[3].top == ((905, " world", b" world", -0.5),)


async def test_a_prompt_of_one_token_has_no_score_to_wait_for(stage):
    stage.frontend.generate(1, prompt="Hello", prompt_logprobs=1, max_tokens=0)
    assert (await stage.frontend.next(PromptScores))[0].scores == (None,)


# Ends


async def test_an_aborted_request_ends_when_the_scheduler_says_so(stage):
    stage.frontend.generate(1, 2)
    await stage.submitted(2)
    stage.emit(1, [19556])
    await stage.frontend.next(Text)
    stage.frontend.send(Abort((1, 999)))
    (cancel,) = await stage.cancelled()
    assert (cancel.requests, cancel.reason) == ((1,), "abort")
    stage.emit(1, [905], 1)
    stage.emit(1, [], end="abort")
    (end,) = await stage.frontend.ended(1)
    assert (end.reason, end.completion_tokens) == ("abort", 1)
    assert stage.frontend.texts[1] == "Hello"
    stage.emit(2, [905], end="length")
    await stage.frontend.ended(2)
    assert stage.forgotten()


async def test_nobody_can_abort_anothers_request(stage):
    stage.frontend.generate(1)
    await stage.submitted()
    other = stage.visit(b"server-1")
    other.send(Abort((1,)))
    other.send(Describe(1))
    await other.next(ModelCard)
    assert not stage.scheduler.of(module.Cancel)


async def test_a_refused_request_fails_with_what_the_scheduler_said(stage):
    stage.frontend.generate(1)
    await stage.submitted()
    stage.tell(Refused(1, 429, "overloaded", "try again in 2 s", 2.0, 0.1))
    (failed,) = await stage.frontend.ended(1)
    assert failed == Failed(1, 429, "overloaded", "try again in 2 s", None, 2.0, 0.1)
    assert stage.forgotten()


async def test_requests_of_a_frontend_that_is_gone_are_cancelled_and_forgotten(stage):
    other = stage.visit(b"server-1")
    other.generate(5, 6)
    stage.frontend.generate(1)
    await stage.submitted(3)
    await other.next(Accepted, 2)
    other.visit.close()
    sent = 0
    while not stage.scheduler.of(module.Cancel):  # the desk learns of the end of a connection with one of the next sends
        stage.emit(5, [19556], sent)
        stage.frontend.send(Describe(sent))
        sent += 1
        await stage.frontend.next(ModelCard, sent)
    (cancel,) = await stage.cancelled()
    assert (sorted(cancel.requests), cancel.reason) == ([5, 6], "abort")
    assert list(stage.actor._live) == [1]


# Restarts


async def test_a_token_that_comes_twice_counts_once(stage):
    stage.frontend.generate(1)
    await stage.submitted()
    stage.emit(1, [19556, 905])
    stage.emit(1, [19556, 905, 28], 0, end="length")
    (end,) = await stage.frontend.ended(1)
    assert stage.frontend.texts[1] == "Hello world," and end.completion_tokens == 3


async def test_tokens_beyond_a_gap_wait_until_the_gap_is_told(stage):
    stage.frontend.generate(1, 2)
    await stage.submitted(2)
    stage.tell(Tokens(1, 1, [1, 2, 1], [1, 0, 2], [905, 905, 28]))
    await stage.frontend.next(Text)
    assert stage.frontend.texts == {2: " world"}
    stage.emit(1, [19556, 905, 28], 0, end="length")
    (end,) = await stage.frontend.ended(1)
    assert stage.frontend.texts[1] == "Hello world," and end.completion_tokens == 3


async def test_scores_from_beyond_a_gap_wait_with_their_tokens(stage):
    stage.frontend.generate(1, logprobs=0)
    await stage.submitted()
    columns = {"logprobs": [TokenLogprobs(1, index, -float(index)) for index in (2, 0, 1, 2)]}
    stage.tell(Tokens(1, 1, [1] * 4, [2, 0, 1, 2], [28, 19556, 905, 28], ends=[TokenEnd(1, "length", None, 0, 0.0, 0)], **columns))
    await stage.frontend.ended(1)
    assert stage.frontend.texts[1] == "Hello world,"
    assert [score.logprob for score in stage.frontend.scores[1]] == [0.0, -1.0, -2.0]


async def test_an_end_beyond_a_gap_is_asked_for_again_from_what_is_there(stage):
    stage.frontend.generate(1)
    await stage.submitted()
    stage.emit(1, [19556])
    stage.emit(1, [28], 2, end="length")
    _, again = await stage.submitted(2)
    assert (again.request, again.emitted) == (1, [19556])
    stage.emit(1, [905, 28], 1, end="length")
    (end,) = await stage.frontend.ended(1)
    assert stage.frontend.texts[1] == "Hello world," and end.completion_tokens == 3


async def test_a_request_that_nobody_claims_is_cancelled_after_a_while(stage, monkeypatch):
    monkeypatch.setattr(module, "STRANGER_GRACE", 0.0)
    stage.emit(7, [19556])
    stage.emit(7, [905], 1)
    stage.emit(7, [905], 2)
    (cancel,) = await stage.cancelled()
    assert (cancel.requests, cancel.reason) == ((7,), "abort")
    stage.emit(7, [], end="abort")
    stage.frontend.generate(7)
    await stage.submitted()
    assert stage.actor._strangers == {}
    assert len(await stage.cancelled()) == 1


async def test_a_new_scheduler_gets_live_requests_with_the_tokens_they_have(stage):
    stage.frontend.generate(1, 2, 3, 4, stop=(" world",))
    await stage.submitted(4)
    stage.emit(1, [19556, 28])
    stage.emit(2, [905])
    await stage.cancelled()
    stage.frontend.send(Abort((3,)))
    await stage.cancelled(2)
    stage.tell(PeerDied("scheduler", 1))
    stage.tell(SchedulerUp(2))
    submits = await stage.submitted(6)
    assert [(submit.request, submit.emitted) for submit in submits[4:]] == [(1, [19556, 28]), (4, [])]
    stopped, aborted = await stage.frontend.ended(2, 3)
    assert (stopped.reason, stopped.stop, stopped.completion_tokens) == ("stop", " world", 1)
    assert aborted.reason == "abort"
    stage.emit(1, [19556, 28, 30], 0, end="length")
    (end,) = await stage.frontend.ended(1)
    assert stage.frontend.texts[1] == "Hello,." and end.completion_tokens == 3


async def test_a_request_submitted_again_shows_only_what_is_new(stage):
    ids = stage.encode("Say 👩 the End")
    for cut in range(len(ids) + 1):
        request = 100 + cut
        stage.frontend.generate(request, stop=("the Ending",), emitted=(tuple(ids[:cut]),))
        submits = await stage.submitted(cut + 1)
        assert submits[-1].emitted == ids[:cut]
        shown = stage.tokenizer.stream(True, [19556])
        before = "".join(shown.add(token) for token in ids[:cut])
        held = max(n for n in range(len("the Ending")) if before.endswith("the Ending"[:n]))
        stage.emit(request, ids, end="length")
        (end,) = await stage.frontend.ended(request)
        assert before[: len(before) - held] + stage.frontend.texts.get(request, "") == "Say 👩 the End"
        assert stage.frontend.tokens.get(request, []) == ids[cut:]
        assert end.completion_tokens == len(ids)


async def test_a_request_that_had_met_its_stop_string_ends_when_it_is_submitted_again(stage):
    stage.frontend.generate(1, stop=(" world",), emitted=((19556, 905),))
    (end,) = await stage.frontend.ended(1)
    assert (end.reason, end.stop, end.completion_tokens) == ("stop", " world", 2)
    assert (await stage.cancelled())[0].reason == "stop"
    assert stage.forgotten() and not stage.scheduler.of(Submit)


async def test_a_request_that_is_asked_for_again_starts_anew(stage):
    stage.frontend.generate(1)
    await stage.submitted()
    stage.frontend.generate(1, emitted=((19556,),))
    await stage.submitted(2)
    stage.emit(1, [19556, 905], end="length")
    (end,) = await stage.frontend.ended(1)
    assert stage.frontend.texts[1] == " world" and end.completion_tokens == 2


async def test_a_request_that_has_moved_to_another_tokenizer_is_forgotten_without_a_word(stage):
    for request, attempt in ((1, 0), (2, 2)):
        stage.frontend.generate(request, attempt=attempt)
        await stage.submitted(request)
        stage.tell(Moved(request, 1))
    stage.emit(2, [19556], end="length")
    await stage.frontend.ended(2)
    assert 1 not in stage.frontend.last_words
    assert stage.forgotten()
    assert not stage.scheduler.of(Cancel)


# Long prompts


async def test_a_long_prompt_lets_others_pass_and_can_be_aborted(stage, monkeypatch):
    import threading

    gate = threading.Event()
    encode = stage.tokenizer.encode

    def slow(text, add_special):
        if len(text) > module.LONG:
            assert gate.wait(10)
        return encode(text, add_special)

    monkeypatch.setattr(stage.tokenizer, "encode", slow)
    monkeypatch.setattr(module, "LONG", 1000)
    stage.frontend.generate(1, 2, prompt="word " * 400)
    stage.frontend.generate(3)
    (submit,) = await stage.submitted()
    assert submit.request == 3
    stage.frontend.send(Abort((1,)))
    (end,) = await stage.frontend.ended(1)
    assert end.reason == "abort"
    stage.frontend.send(Tokenize(9, TextPrompt("word " * 300)))
    gate.set()
    submits = await stage.submitted(2)
    assert submits[1].request == 2 and len(submits[1].prompt) == 401
    assert len((await stage.frontend.next(Tokenized))[0].ids) == 301
    assert not stage.actor._jobs


# Calls


async def test_tokenize_and_detokenize_answer_or_fail_with_the_callers_number(stage):
    stage.frontend.send(Tokenize(1, TextPrompt("Hello world"), return_token_strs=True))
    stage.frontend.send(Tokenize(2, TokenPrompt((1, 2))))
    tokenized = await stage.frontend.next(Tokenized, 2)
    assert tokenized == [Tokenized(1, [19556, 905], ["Hello", "Ġworld"], 8192), Tokenized(2, [1, 2], None, 8192)]
    stage.frontend.send(Detokenize(3, (1, 19556, 905)))
    assert await stage.frontend.next(Detokenized) == [Detokenized(3, "<|im_start|>Hello world")]
    stage.frontend.send(Detokenize(4, (70000,)))
    stage.frontend.send(Tokenize(5, ChatPrompt(b"no")))
    bad_ids, bad_chat = await stage.frontend.next(CallFailed, 2)
    assert (bad_ids.call, bad_ids.status, bad_ids.param) == (4, 400, "tokens")
    assert (bad_chat.call, bad_chat.status, bad_chat.param) == (5, 400, "messages")


async def test_the_card_tells_what_is_served(stage):
    stage.frontend.send(Describe(11))
    (card,) = await stage.frontend.next(ModelCard)
    assert (card.call, card.name, card.context, card.vocab_size, card.has_chat_template) == (11, "smol", 8192, 49152, True)


async def test_metrics_count_what_passed(stage):
    stage.frontend.generate(1)
    await stage.submitted()
    stage.tell(Drain())
    stage.emit(1, [19556, 905], end="length")
    await stage.frontend.ended(1)
    series = {series.name: series.value for series in stage.process.metrics.snapshot()}
    assert series["headrace_tokenizer_prompt_tokens_total"] == 1
    assert series["headrace_tokenizer_output_tokens_total"] == 2
    assert series["headrace_tokenizer_live_requests"] == 0
    assert series["headrace_tokenizer_encode_seconds"].sum > 0
