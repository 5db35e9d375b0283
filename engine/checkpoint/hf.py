"""A Hugging Face model directory: its config.json, and where each tensor lies in its safetensors files.

A safetensors file is an 8-byte length, a JSON header {name: {dtype, shape, data_offsets}}, and the tensors' bytes, which the header must
cover without gap or overlap (the format's own rule). Large models are cut into several files with an index that maps names to files.

A multimodal Gemma 3 directory reads as its text model: config.json's `text_config`, and the tensors of the language model under the names
that the text-only model has. Everything wrong is a UserError of one line that names the file. Nothing here loads a tensor.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from headrace.engine.checkpoint.wording import in_line, shown
from headrace.engine.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""
MAX_HEADER_PARTS = 2_000_000
"""Most commas and colons of a header: one of 200,000 tensors has fewer. A header of nothing else would become gigabytes when it is read."""
MAX_JSON_BYTES = 32 << 20
"""The largest known index has a third of it; what is read takes up to twenty times as much memory."""
MAX_DIMENSIONS = 8
MAX_NAME_BYTES = 255
"""Of a file, by Linux."""

DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes of one element of each safetensors type."""

_TEXT_PARTS = {"Gemma3ForConditionalGeneration": "Gemma3ForCausalLM"}
"""Multimodal architecture to that of the text model inside it."""
_TEXT_PREFIXES = (("language_model.model.", "model."), ("language_model.lm_head.", "lm_head."), ("model.language_model.", "model."))
_SHARED_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "quantization_config")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies."""

    file: Path
    dtype: str
    """A key of DTYPE_BYTES."""
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""
    nbytes: int


class _Entry(msgspec.Struct):
    """A tensor as the header describes it."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a small file."""
    try:
        value = json.loads(_small(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {in_line(error)}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} should hold a JSON object, not {type(value).__name__}")
    return value


def _small(path: Path) -> bytes:
    """The content of a JSON file, if it has the size of one."""
    try:
        if (size := path.stat().st_size) > MAX_JSON_BYTES:
            raise UserError(f"{path} has {size} bytes: too large for a JSON file of a model")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def read_config(directory: Path) -> dict[str, Any]:
    """config.json; of a multimodal model its text part, with `architectures` naming the text model."""
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(f"{directory} has no config.json: a model directory needs config.json and *.safetensors{_near_gguf(directory)}")
    config = read_json(path)
    text_architecture = _TEXT_PARTS.get(architecture(config))
    text = config.get("text_config")
    if text_architecture is None or not isinstance(text, dict):
        return config
    shared = {key: config[key] for key in _SHARED_KEYS if key in config}
    return {**shared, **text, "architectures": [text_architecture]}


def architecture(config: dict[str, Any]) -> str:
    """The first of `architectures`, or "" when config.json names none."""
    names = config.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""


def read_tensors(directory: Path) -> dict[str, StoredTensor]:
    """All tensors of the model by name, from one file or from the files of an index."""
    if (directory / INDEX).is_file():
        tensors = _read_sharded(directory)
    else:
        tensors = read_header(_single_file(directory))
    return _text_only(tensors)


def _single_file(directory: Path) -> Path:
    if (directory / SINGLE).is_file():
        return directory / SINGLE
    files = sorted(directory.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    if files:
        raise UserError(f"{directory} has {len(files)} safetensors files but no {INDEX}, which says what is in them")
    if pickled := sorted([*directory.glob("*.bin"), *directory.glob("*.pt"), *directory.glob("*.pth")]):
        raise UserError(
            f"{directory} has only pickled weights ({pickled[0].name}), which can run code and are never loaded: save as safetensors"
        )
    raise UserError(f"{directory} has no *.safetensors: the weights are missing{_near_gguf(directory)}")


def _near_gguf(directory: Path) -> str:
    """The way out for a directory that holds GGUF files."""
    files = sorted(directory.glob("*.gguf"))
    return f"; it holds {files[0].name}: give the path of that file" if files else ""


def _read_sharded(directory: Path) -> dict[str, StoredTensor]:
    path = directory / INDEX
    try:
        index = msgspec.json.decode(_small(path), type=_Index)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a safetensors index: {in_line(error)}") from None
    tensors: dict[str, StoredTensor] = {}
    for name in sorted(set(index.weight_map.values())):
        if name != Path(name).name or not name.endswith(".safetensors") or len(os.fsencode(name)) > MAX_NAME_BYTES:
            raise UserError(f"{path} names the file {shown(name)}, which is no safetensors file of this directory")
        if not (directory / name).is_file():
            raise UserError(f"{directory} lacks the file {shown(name)}, which {INDEX} names: an unfinished download? Get it again")
        header = read_header(directory / name)
        if twice := tensors.keys() & header.keys():
            raise UserError(f"{directory / name} holds tensor {shown(min(twice))}, which another file has too")
        tensors |= header
    for name, file in index.weight_map.items():
        if name not in tensors or tensors[name].file.name != file:
            raise UserError(f"{path} says that {shown(file)} holds tensor {shown(name)}, but it does not")
    return tensors


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, checked against the file's size and against each other."""

    def fault(what: str) -> UserError:
        return UserError(f"{path} is not a valid safetensors file: {what}")

    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if start == b"version ":
                raise UserError(f"{path} is a Git LFS pointer, not the weights themselves: run `git lfs pull` in its directory")
            if len(start) < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise fault(f"its header claims {length} bytes and the file has {size}")
            raw = file.read(length)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if (parts := raw.count(b",") + raw.count(b":")) > MAX_HEADER_PARTS:
        raise fault(f"its header has {parts} parts: at most {MAX_HEADER_PARTS} are possible")
    try:
        fields = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
        fields.pop("__metadata__", None)
        entries = {name: msgspec.json.decode(field, type=_Entry) for name, field in fields.items()}
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise fault(f"its header is damaged: {in_line(error)}") from None
    tensors = {name: _placed(path, name, entry, 8 + length, fault) for name, entry in entries.items()}
    end = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != end:
            raise fault(f"tensor {shown(name)} starts at byte {tensor.offset} where the one before ends at {end}")
        end = tensor.offset + tensor.nbytes
    if end != size:
        raise fault(f"its tensors end at byte {end} and the file at {size}{': an unfinished download? Get it again' if end > size else ''}")
    return tensors


def _placed(path: Path, name: str, entry: _Entry, start: int, fault: Any) -> StoredTensor:
    size = DTYPE_BYTES.get(entry.dtype)
    if size is None:
        raise UserError(f"{path}: tensor {shown(name)} has the unknown type {shown(entry.dtype)}")
    begin, end = entry.data_offsets
    if len(entry.shape) > MAX_DIMENSIONS:
        raise fault(f"tensor {shown(name)} has {len(entry.shape)} dimensions: at most {MAX_DIMENSIONS} are possible")
    if begin < 0 or end < begin or min(entry.shape, default=0) < 0 or math.prod(entry.shape) * size != end - begin:
        raise fault(f"tensor {shown(name)} of {entry.dtype} {shown(entry.shape)} lies at {begin}…{end}, which does not fit")
    return StoredTensor(path, entry.dtype, tuple(entry.shape), start + begin, end - begin)


def _text_only(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Of a multimodal checkpoint the language model alone, under the text-only model's names; any other as it is."""
    if not any(name.startswith(prefix) for name in tensors for prefix, _ in _TEXT_PREFIXES):
        return tensors
    text = {name: tensor for name, tensor in tensors.items() if name.startswith("lm_head.")}
    for name, tensor in tensors.items():
        for prefix, plain in _TEXT_PREFIXES:
            if name.startswith(prefix):
                text[plain + name.removeprefix(prefix)] = tensor
    return text
