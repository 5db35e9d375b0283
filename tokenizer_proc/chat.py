"""Chat templates: a conversation becomes the text that the model was trained to continue.

A template is a Jinja program that came with the model, so it runs in Jinja's immutable sandbox, and what it writes is bounded. The
surroundings (whitespace rules, `tojson`, `raise_exception`, `strftime_now`, loop controls, `generation` blocks) are those of
Hugging Face's `apply_chat_template`.

    messages, tools, arguments (JSON) ─▶ checked, contents made plain ─▶ template ─▶ text, encoded with no BOS: the template writes its own
"""

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import msgspec
from jinja2 import nodes

from headrace.engine.messages.frontend import ChatPrompt
from headrace.tokenizer_proc.rejection import Rejection

MAX_TEXT = 32 << 20
"""Most characters that a template may write."""

MAX_MESSAGE = 1000
"""Most characters of a template's own words that a client is told."""

RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "raise_exception", "strftime_now"})
"""Names that template arguments cannot take."""

_END_OF_FINAL = "HEADRACE-END-OF-FINAL-MESSAGE "
"""Marks where the final message ends in the rendered text; its last space shows whether the template trims."""


class Refusal(Exception):
    """What a template says by `raise_exception`."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what an assistant wrote, for training; here it only prints its body."""

    tags = {"generation"}

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise Refusal(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplates:
    """The templates of one model, compiled. `sources` by name; `names` are the special tokens that they may print.

    What it computes is not bounded: see `renderer.py`.
    """

    def __init__(self, sources: Mapping[str, str], names: Mapping[str, str]) -> None:
        environment = _environment()
        self._names = dict(names)
        self._templates: dict[str, tuple[jinja2.Template, bool]] = {}
        self.fault: str | None = None
        """Why there is no template to use, for a user."""
        try:
            for name, source in sources.items():
                self._templates[name] = environment.from_string(source), _reads_parts(environment.parse(source))
        except jinja2.TemplateSyntaxError as error:
            self._templates.clear()
            self.fault = f"the model's chat template is broken (line {error.lineno}: {error.message}): use /v1/completions"
        except Exception as error:  # nested too deeply, too large for memory
            self._templates.clear()
            self.fault = f"the model's chat template cannot be compiled ({type(error).__name__}): use /v1/completions"
        if not self._templates and self.fault is None:
            self.fault = "the model has no chat template: use /v1/completions with a plain prompt"

    @property
    def usable(self) -> bool:
        return self.fault is None

    def render(self, prompt: ChatPrompt) -> str:
        """The conversation as text. Rejection when it is malformed, or refused by the template."""
        if self.fault is not None:
            raise Rejection(self.fault, "messages", "no_chat_template")
        tools = _parse(prompt.tools, "tools", list | None)
        arguments = _parse(prompt.template_arguments, "chat_template_kwargs", dict)
        if taken := RESERVED & arguments.keys():
            raise Rejection(
                f"chat_template_kwargs sets {min(taken)!r}, which the request itself sets: leave it out", "chat_template_kwargs"
            )
        template, reads_parts = self._choose(tools)
        messages = [_checked(message, place, reads_parts) for place, message in enumerate(_parse(prompt.messages, "messages", list))]
        if not messages:
            raise Rejection("messages is empty: give at least one message", "messages")
        if prompt.continue_final_message:
            _mark_final(messages, prompt)
        variables = {**self._names, **arguments, "messages": messages, "tools": tools}
        text = _run(template, {**variables, "add_generation_prompt": prompt.add_generation_prompt})
        return _cut_at_mark(text) if prompt.continue_final_message else text

    def _choose(self, tools: list[Any] | None) -> tuple[jinja2.Template, bool]:
        templates = self._templates
        if tools and "tool_use" in templates:
            return templates["tool_use"]
        return templates.get("default") or next(iter(templates.values()))


def _run(template: jinja2.Template, variables: dict[str, Any]) -> str:
    pieces, length = [], 0
    try:
        for piece in template.generate(variables):
            pieces.append(piece)
            length += len(piece)
            if length > MAX_TEXT:
                raise Rejection(f"the chat template wrote over {MAX_TEXT} characters: send a shorter conversation", "messages")
    except Rejection:
        raise
    except Refusal as error:
        raise Rejection(str(error)[:MAX_MESSAGE], "messages", "chat_template_refused") from None
    except Exception as error:  # a template can fail in as many ways as a program
        said = f"{type(error).__name__}: {str(error)[:MAX_MESSAGE]}"
        raise Rejection(
            f"the chat template cannot render these messages ({said}): check their roles and contents", "messages", "chat_template_failed"
        ) from None
    return "".join(pieces)


def _parse(data: bytes, param: str, kind: Any) -> Any:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Rejection(f"{param} is malformed: {error}", param) from None


def _checked(message: Any, place: int, reads_parts: bool) -> dict[str, Any]:
    """A copy of a message in the form that templates expect."""
    where = f"messages[{place}]"
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise Rejection(f"{where} is no object with a role: send {{'role': …, 'content': …}}", where)
    content = message.get("content")
    if isinstance(content, list):
        texts = [_part_text(part, f"{where}.content[{index}]") for index, part in enumerate(content)]
        message = {**message, "content": [{"type": "text", "text": text} for text in texts] if reads_parts else "\n".join(texts)}
    elif content is not None and not isinstance(content, str):
        raise Rejection(f"{where}.content is neither text nor a list of parts: send a string", f"{where}.content")
    if isinstance(message.get("tool_calls"), list):
        message = {**message, "tool_calls": [_with_parsed_arguments(call) for call in message["tool_calls"]]}
    return message


def _part_text(part: Any, where: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise Rejection(f"{where} is of type {kind!r}: this model reads only parts of type 'text'", where)


def _with_parsed_arguments(call: Any) -> Any:
    """Clients send a call's arguments as JSON text; templates print them as an object."""
    if not isinstance(call, dict) or not isinstance(call.get("function"), dict):
        return call
    function = call["function"]
    try:
        arguments = msgspec.json.decode(function.get("arguments", ""), type=dict)
    except (msgspec.MsgspecError, TypeError):
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def _mark_final(messages: list[dict[str, Any]], prompt: ChatPrompt) -> None:
    if prompt.add_generation_prompt:
        raise Rejection(
            "continue_final_message and add_generation_prompt exclude each other: set add_generation_prompt to false",
            "continue_final_message",
        )
    final = dict(messages[-1])
    content = final.get("content")
    if isinstance(content, str):
        final["content"] = content + _END_OF_FINAL
    elif content:
        last = {**content[-1], "text": content[-1]["text"] + _END_OF_FINAL}
        final["content"] = [*content[:-1], last]
    else:
        raise Rejection("continue_final_message needs a final message with content: give it one", "continue_final_message")
    messages[-1] = final


def _cut_at_mark(text: str) -> str:
    end = text.rfind(_END_OF_FINAL.rstrip())
    if end < 0:
        raise Rejection("the chat template does not print the final message, so it cannot be continued", "continue_final_message")
    trims = not text.startswith(_END_OF_FINAL, end)
    return text[:end].rstrip() if trims else text[:end]


def _reads_parts(tree: nodes.Template) -> bool:
    """Whether the template walks over the parts of a message's content itself."""
    return any(_is_content(loop.iter) for loop in tree.find_all(nodes.For))


def _is_content(node: nodes.Node) -> bool:
    match node:
        case nodes.Filter():
            return node.node is not None and _is_content(node.node)
        case nodes.Getattr():
            return node.attr == "content"
        case nodes.Getitem():
            return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
        case nodes.Name():
            return node.name == "content"
    return False
