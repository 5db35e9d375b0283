"""A template that never ends or wants all memory costs its conversation, and nothing else."""

import json
import os
import signal
import time

import pytest

from headrace.engine.messages.frontend import ChatPrompt
from headrace.tokenizer_proc import renderer
from headrace.tokenizer_proc.rejection import Rejection
from headrace.tokenizer_proc.renderer import Renderer

SAID = "{{ messages[0].content }}"


def prompt(content: str = "hi") -> ChatPrompt:
    return ChatPrompt(json.dumps([{"role": "user", "content": content}]).encode())


@pytest.fixture
def load():
    opened = []

    def load(source: str, names: dict[str, str] | None = None) -> Renderer:
        opened.append(Renderer())
        opened[-1].load({"default": source}, names or {})
        return opened[-1]

    yield load
    for one in opened:
        one.close()


def only_for(word: str, trap: str) -> str:
    """A template that springs its trap when the message is `word`."""
    return "{% if messages[0].content == '" + word + "' %}" + trap + "{% endif %}" + SAID


def test_a_conversation_is_rendered_as_in_the_process_itself(load):
    one = load("{{ bos_token }}" + SAID, {"bos_token": "<s>"})
    assert one.usable
    assert one.render(prompt("ü\n")) == "<s>ü\n"
    assert one.render(prompt("x" * 1_000_000)) == "<s>" + "x" * 1_000_000


def test_a_rejection_comes_through_with_all_it_says(load):
    one = load("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(Rejection, match=r"^roles must alternate$") as caught:
        one.render(prompt())
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, "messages", "chat_template_refused")
    with pytest.raises(Rejection, match="messages is empty"):
        one.render(ChatPrompt(b"[]"))


@pytest.mark.parametrize(
    "trap",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{{ 7 ** (7 ** ((messages | length) * 11)) }}",
        "{{ range(99999) | map('replace', '', 'x' * 100000) | list | length }}",
    ],
    ids=["loops", "recursion", "a power", "a filter over many"],
)
def test_a_template_that_does_not_end_is_ended_and_the_next_conversation_is_rendered(load, trap):
    one = load(only_for("spring", trap))
    began = time.monotonic()
    with pytest.raises(Rejection, match=r"does not end|cannot render") as caught:
        one.render(prompt("spring"))
    assert time.monotonic() - began < renderer.WAIT_S + 5
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "chat_template_failed", "messages")
    assert one.render(prompt("hello")) == "hello"


@pytest.mark.parametrize(
    "trap",
    [
        "{{ 'x' * 10 ** 10 }}",
        "{% set ns = namespace(x='x') %}{% for i in range(50) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
        "{{ [0] * 10 ** 10 }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ '{:>9999999999}'.format(1) }}",
        "{{ 'x'.center(10 ** 10) }}",
        "{{ 'x' | center(10 ** 10) }}",
        "{{ [1] | tojson(indent=10 ** 10) }}",
        "{{ lipsum(n=10 ** 7) }}",
        # Not a constant, which would be computed when it is compiled.
        "{{ raise_exception('x' * (messages | length * 10 ** 8)) }}",
        "{% for i in range(90000) %}{{ 'x' * 10000 }}{% endfor %}",
    ],
)
def test_a_template_that_builds_gigabytes_is_refused_in_few_words(load, trap):
    one = load(only_for("spring", trap))
    with pytest.raises(Rejection) as caught:
        one.render(prompt("spring"))
    assert caught.value.status == 400
    assert len(caught.value.message) < 2000
    assert one.render(prompt("hello")) == "hello"


@pytest.mark.parametrize(
    "source",
    ["{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{% if 1 %}" * 3000 + "{% endif %}" * 3000, "{{ 7 ** (7 ** 11) }}", "{% for %}"],
)
def test_a_template_that_cannot_be_compiled_is_a_fault_that_is_told(load, source):
    one = load(source)
    with pytest.raises(Rejection) as caught:
        one.render(prompt())
    assert one.fault is None or one.fault == caught.value.message
    assert caught.value.status == 400


def test_a_process_that_was_killed_meanwhile_is_replaced_without_a_word(load):
    one = load(SAID)
    os.kill(one._process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, one._process.pid, os.WEXITED | os.WNOWAIT)
    assert one.render(prompt("hello")) == "hello"


def test_a_process_that_stands_still_is_given_up(load, monkeypatch):
    one = load(SAID)
    monkeypatch.setattr(renderer, "WAIT_S", 0.2)
    os.kill(one._process.pid, signal.SIGSTOP)
    with pytest.raises(Rejection, match="does not end"):
        one.render(prompt())
    monkeypatch.setattr(renderer, "WAIT_S", 10.0)
    assert one.render(prompt("hello")) == "hello"


def test_the_process_ends_with_its_owner(load):
    one = load(SAID)
    process = one._process
    process.stdin.close()
    assert process.wait(10) == 0
    process.stdin = open(os.devnull, "wb")  # noqa: SIM115, PTH123
