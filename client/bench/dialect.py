"""What a server understands, found out by asking it: OpenAI's shapes are common ground, everything beyond them differs.

    GET /v1/models ─ POST /tokenize (two shapes) ─ a one-token request with all extensions, then with fewer ─▶ Dialect

Found once before a measurement; nothing is asked again while the clock runs.
"""

import msgspec

from headrace.client.bench.options import Options
from headrace.client.bench.wire import ask
from headrace.client.calls import Server
from headrace.engine.errors import UserError

Prompt = str | list[int]


class Dialect(msgspec.Struct):
    """One server's."""

    model: str
    endpoint: str
    tokenizer: str | None = None
    """The field in which `/tokenize` wants its text: "prompt" (as vLLM's) or "content" (as llama.cpp's); None without `/tokenize`."""
    token_ids: bool = False
    """Prompts may be lists of token ids."""
    ignore_eos: bool = False
    include_usage: bool = False

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.endpoint == "chat" else "/v1/completions"

    def body(self, prompt: Prompt, max_tokens: int, temperature: float, stream: bool = True) -> bytes:
        """The JSON body of one generation request."""
        body: dict[str, object] = {"model": self.model, "max_tokens": max_tokens, "temperature": temperature, "stream": stream}
        if self.endpoint == "chat":
            body["messages"] = [{"role": "user", "content": prompt}]
        else:
            body["prompt"] = prompt
        if self.ignore_eos:
            body["ignore_eos"] = True
        if self.include_usage and stream:
            body["stream_options"] = {"include_usage": True}
        return msgspec.json.encode(body)


async def discover(server: Server, options: Options, sample_text: str) -> Dialect:
    """Ask the server what it understands; `sample_text` serves as the prompt. Raises `UserError` when it cannot be measured."""
    try:
        model = options.model or await _first_model(server, options.url)
        dialect = Dialect(model, options.endpoint)
        dialect.tokenizer = await _tokenizer_field(server, model)
        await _try_extensions(server, dialect, options, sample_text)
        if dialect.tokenizer and options.endpoint == "completions":
            ids = await tokenize(server, dialect, sample_text, special=False)
            dialect.token_ids = (await _generate_one(server, dialect, ids))[0] == 200
    except OSError as error:
        raise UserError(f"no server answers at {options.url} ({error}): start one (`headrace serve`) or give its --url") from None
    return dialect


async def tokenize(server: Server, dialect: Dialect, text: str, special: bool) -> list[int]:
    """The token ids of `text`, with the special tokens the tokenizer adds by itself or without. Raises `OSError`, `UserError`."""
    if dialect.tokenizer == "prompt":
        body: dict[str, object] = {"model": dialect.model, "prompt": text, "add_special_tokens": special}
    else:
        body = {"content": text, "add_special": special}
    return await _tokens(server, body)


async def count_tokens(server: Server, dialect: Dialect, text: str) -> int:
    """How many prompt tokens a request with this text has, template included. Raises `OSError`, `UserError`."""
    if dialect.endpoint != "chat":
        return len(await tokenize(server, dialect, text, special=True))
    messages = [{"role": "user", "content": text}]
    if dialect.tokenizer == "prompt":
        return len(await _tokens(server, {"model": dialect.model, "messages": messages, "add_generation_prompt": True}))
    status, reply = await ask(server, "POST", "/apply-template", {"messages": messages})
    try:
        rendered = msgspec.json.decode(reply)["prompt"]
    except (msgspec.DecodeError, KeyError, TypeError):
        raise UserError(f"/apply-template answered {status}: use --endpoint completions for exact prompt lengths") from None
    return len(await tokenize(server, dialect, rendered, special=True))


async def prompt_tokens_of(server: Server, dialect: Dialect, text: str) -> int | None:
    """What the server's usage says of a prompt; None when it does not say."""
    status, reply = await _generate_one(server, dialect, text)
    try:
        return int(msgspec.json.decode(reply)["usage"]["prompt_tokens"]) if status == 200 else None
    except (msgspec.DecodeError, KeyError, TypeError):
        return None


async def _first_model(server: Server, url: str) -> str:
    status, reply = await ask(server, "GET", "/v1/models")
    try:
        return msgspec.json.decode(reply)["data"][0]["id"]
    except (msgspec.DecodeError, KeyError, IndexError, TypeError):
        raise UserError(f"{url}/v1/models answered {status} and lists no model: {error_text(reply)}; give --model NAME") from None


async def _tokenizer_field(server: Server, model: str) -> str | None:
    shapes: tuple[tuple[str, dict[str, object]], ...] = (
        ("prompt", {"model": model, "prompt": "one two", "add_special_tokens": False}),
        ("content", {"content": "one two", "add_special": False}),
    )
    for field, body in shapes:
        try:
            # A server of the other shape may answer 200 and an empty list.
            if await _tokens(server, body):
                return field
        except UserError:
            continue
    return None


async def _tokens(server: Server, body: dict[str, object]) -> list[int]:
    status, reply = await ask(server, "POST", "/tokenize", body)
    try:
        tokens = msgspec.json.decode(reply)["tokens"] if status == 200 else None
    except (msgspec.DecodeError, KeyError, TypeError):
        tokens = None
    if not isinstance(tokens, list):
        raise UserError(f"/tokenize answered {status}: {error_text(reply)}")
    return tokens


async def _try_extensions(server: Server, dialect: Dialect, options: Options, text: str) -> None:
    """Find the most extensions with which a one-token streamed request succeeds."""
    status, reply = 0, b""
    for usage, ignore in ((True, True), (True, False), (False, True), (False, False)):
        if ignore and not options.ignore_eos:
            continue
        dialect.include_usage, dialect.ignore_eos = usage, ignore
        status, reply = await _generate_one(server, dialect, text, stream=True)
        if status not in (400, 422):
            break
    if status != 200:
        hint = {401: "give --api-key", 403: "give --api-key", 404: "give --model or another --endpoint"}.get(
            status, "it cannot be measured so"
        )
        raise UserError(f"{options.url}{dialect.path} answered {status}: {error_text(reply)}; {hint}")


async def _generate_one(server: Server, dialect: Dialect, prompt: Prompt, stream: bool = False) -> tuple[int, bytes]:
    body = msgspec.json.decode(dialect.body(prompt, 1, 0.0, stream))
    return await ask(server, "POST", dialect.path, body, timeout_s=300.0)


def error_text(reply: bytes) -> str:
    """The message in an error's body, on one line and not too long."""
    try:
        parsed = msgspec.json.decode(reply)
        error = parsed.get("error", parsed)
        text = str(error.get("message", error)) if isinstance(error, dict) else str(error)
    except (msgspec.DecodeError, AttributeError):
        text = reply.decode("utf-8", "replace")
    return " ".join(text.split())[:300] or "(no text)"
