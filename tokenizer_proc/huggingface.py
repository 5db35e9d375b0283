"""A tokenizer from a Hugging Face directory.

`tokenizer.json` is the tokenizer; `tokenizer_config.json` beside it says which of its tokens are BOS and EOS and whether a prompt
gets them, and may hold the chat template, which may also lie in `chat_template.jinja` or `chat_template.json`.
"""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from headrace.engine.checkpoint.hf import read_json
from headrace.engine.checkpoint.wording import in_line
from headrace.engine.errors import UserError
from headrace.tokenizer_proc.parts import Parts

NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def parts_from_directory(directory: Path) -> Parts:
    """The tokenizer in `directory`. UserError when a file is missing or broken."""
    path = directory / "tokenizer.json"
    if not path.exists():
        raise UserError(f"{directory} has no tokenizer.json: save the model's fast tokenizer there (AutoTokenizer(…).save_pretrained)")
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(f"{path} is no tokenizer ({in_line(error)}): get the file again") from None
    backend.no_truncation()
    backend.no_padding()
    config = _read_optional(directory / "tokenizer_config.json")
    names = {name: text for name in NAMES if (text := _content(config.get(name)))}
    _add_tokens(backend, config, names)
    prefix, suffix = _added_around(backend)
    prefix = _overruled(config.get("add_bos_token"), names.get("bos_token"), prefix, backend)
    suffix = _overruled(config.get("add_eos_token"), names.get("eos_token"), suffix, backend)
    return Parts(backend, prefix, suffix, _templates(directory, config), names)


def _read_optional(path: Path) -> dict[str, Any]:
    """The object in a file; empty when there is no such file."""
    return read_json(path) if path.is_file() else {}


def _content(token: Any) -> str | None:
    """A token is written as its text, or as an object with its text and flags."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _add_tokens(backend: Tokenizer, config: dict[str, Any], names: dict[str, str]) -> None:
    """What the configuration knows beyond tokenizer.json: further added tokens, and that the named ones are special."""
    for entry in config.get("added_tokens_decoder", {}).values():
        if backend.token_to_id(entry["content"]) is None:
            flags = {name: entry[name] for name in ("single_word", "lstrip", "rstrip", "normalized") if name in entry}
            token = AddedToken(entry["content"], special=entry.get("special", False), **flags)
            backend.add_special_tokens([token]) if token.special else backend.add_tokens([token])
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    missing = [text for text in names.values() if text not in special and backend.token_to_id(text) is not None]
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in missing])


def _added_around(backend: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that the tokenizer's post-processor puts before and after a text."""
    bare = backend.encode("a", add_special_tokens=False).ids
    full = backend.encode("a", add_special_tokens=True).ids
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return tuple(full[:start]), tuple(full[start + len(bare) :])
    return (), ()


def _overruled(flag: Any, token: str | None, ids: tuple[int, ...], backend: Tokenizer) -> tuple[int, ...]:
    """An explicit add_bos_token or add_eos_token of the configuration beats the post-processor."""
    if not isinstance(flag, bool):
        return ids
    token_id = backend.token_to_id(token) if flag and token else None
    return () if token_id is None else (token_id,)


def _templates(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    found = _read_optional(directory / "chat_template.json").get("chat_template") or config.get("chat_template")
    if (path := directory / "chat_template.jinja").exists():
        found = path.read_text(encoding="utf-8")
    if isinstance(found, str):
        templates = {"default": found}
    else:
        templates = {entry["name"]: entry["template"] for entry in found or ()}
    for path in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = path.read_text(encoding="utf-8")
    if wrong := [name for name, source in templates.items() if not isinstance(name, str) or not isinstance(source, str)]:
        raise TypeError(f"the chat template {wrong[0]!r:.80} is no text")
    return templates
