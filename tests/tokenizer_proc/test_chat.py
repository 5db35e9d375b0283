"""Chat templates: what they get, what they may do, and what a client is told when they fail."""

import json
from datetime import datetime

import pytest

from headrace.engine.messages.frontend import ChatPrompt
from headrace.tokenizer_proc import chat
from headrace.tokenizer_proc.chat import ChatTemplates
from headrace.tokenizer_proc.rejection import Rejection
from tests.tokenizer_proc import samples

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] + '\n' + message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def prompt(messages, **fields):
    for name in ("template_arguments", "tools"):
        if name in fields:
            fields[name] = json.dumps(fields[name]).encode()
    return ChatPrompt(json.dumps(messages).encode(), **fields)


def render(source, messages=({"role": "user", "content": "hi"},), names=None, **fields):
    return ChatTemplates({"default": source}, names or {}).render(prompt(list(messages), **fields))


def test_the_default_models_template_renders_as_it_stands_in_the_file():
    parts = samples.default_parts()
    text = ChatTemplates(parts.templates, parts.names).render(prompt([{"role": "user", "content": "hi"}]))
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_surroundings_are_those_templates_are_written_for():
    source = """
    {%- set ns = namespace(n=0) -%}
    {% for m in messages %}
        {% if m.content == 'skip' %}{% continue %}{% endif %}
        {% set ns.n = ns.n + 1 %}
{{ bos_token }}{{ m | tojson }} {{ [1] | tojson(indent=1) }} {{ strftime_now('%Y') }}
        {% generation %}gen{% endgeneration %}

    {% endfor %}
{{ ns.n }} {{ flag }} {{ tools[0].name }}"""
    text = render(
        source,
        [{"role": "user", "content": "<ü>"}, {"role": "user", "content": "skip"}],
        {"bos_token": "<s>"},
        template_arguments={"flag": True},
        tools=[{"name": "clock"}],
    )
    year = datetime.now().year
    assert text == f'<s>{{"role": "user", "content": "<ü>"}} [\n 1\n] {year}\ngen\n1 True clock'


def test_what_a_template_raises_is_told_to_the_client():
    with pytest.raises(Rejection, match=r"^roles must alternate$") as caught:
        render("{{ raise_exception('roles must alternate') }}")
    assert (caught.value.status, caught.value.param) == (400, "messages")


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content.nothing.more }}",
        "{{ messages[0]['content'] + 1 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(100000000) %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_that_fails_or_oversteps_is_a_bad_request(source):
    with pytest.raises(Rejection, match="cannot render") as caught:
        render(source)
    assert caught.value.status == 400
    assert "\n" not in caught.value.message


def test_what_a_template_writes_is_bounded(monkeypatch):
    monkeypatch.setattr(chat, "MAX_TEXT", 1000)
    with pytest.raises(Rejection, match="wrote over 1000 characters"):
        render("{% for i in range(90000) %}{{ messages[0].content }}{% endfor %}")


def test_text_parts_become_one_text_unless_the_template_reads_parts():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": parts}]
    assert render("{{ messages[0].content }}", messages) == "a\nb"
    reader = (
        "{% for m in messages %}{% if m['content'] is string %}S{% else %}"
        "{% for p in m['content'] %}[{{ p.text }}]{% endfor %}{% endif %}{% endfor %}"
    )
    assert render(reader, messages) == "[a][b]"
    assert render(reader) == "S"


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "messages is empty"),
        ([5], r"messages\[0\] is no object with a role"),
        ([{"content": "x"}], r"messages\[0\] is no object with a role"),
        ([{"role": "user", "content": 5}], r"messages\[0\].content is neither"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"messages\[0\].content\[0\] is of type 'image_url'"),
        ([{"role": "user", "content": ["x"]}], "of type 'str'"),
    ],
)
def test_malformed_messages_are_refused_by_place(messages, said):
    with pytest.raises(Rejection, match=said):
        render(CHATML, messages)


def test_malformed_json_is_refused():
    templates = ChatTemplates({"default": CHATML}, {})
    with pytest.raises(Rejection, match="messages is malformed"):
        templates.render(ChatPrompt(b"[{"))
    with pytest.raises(Rejection, match="tools is malformed"):
        templates.render(ChatPrompt(b"[]", tools=b"5"))
    with pytest.raises(Rejection, match="sets 'messages'"):
        templates.render(prompt([{"role": "user", "content": "x"}], template_arguments={"messages": []}))


def test_a_final_message_can_be_continued():
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Sure: "}]
    fields = {"add_generation_prompt": False, "continue_final_message": True}
    assert render(CHATML, messages, **fields).endswith("<|im_start|>assistant\nSure: ")
    trimming = CHATML.replace("message['content']", "message['content'] | trim")
    assert render(trimming, messages, **fields).endswith("<|im_start|>assistant\nSure:")
    with pytest.raises(Rejection, match="exclude each other"):
        render(CHATML, messages, continue_final_message=True)
    with pytest.raises(Rejection, match="does not print the final message"):
        render("x", messages, **fields)
    with pytest.raises(Rejection, match="final message with content"):
        render(CHATML, [{"role": "assistant", "content": None}], **fields)


def test_a_calls_arguments_reach_the_template_as_an_object():
    messages = [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"a": [1]}'}}]}]
    assert render("{{ messages[0].tool_calls[0].function.arguments.a[0] }}", messages) == "1"


def test_requests_with_tools_use_the_template_for_tools():
    templates = ChatTemplates({"default": "plain", "tool_use": "tools"}, {})
    messages = [{"role": "user", "content": "x"}]
    assert templates.render(prompt(messages)) == "plain"
    assert templates.render(prompt(messages, tools=[{"name": "f"}])) == "tools"


def test_a_model_without_a_usable_template_names_the_way_out():
    for sources, said in [({}, "no chat template"), ({"default": "{% if %}"}, "is broken")]:
        templates = ChatTemplates(sources, {})
        assert not templates.usable
        with pytest.raises(Rejection, match=f"{said}.*/v1/completions"):
            templates.render(prompt([{"role": "user", "content": "x"}]))
