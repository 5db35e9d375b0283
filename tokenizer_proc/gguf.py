"""A tokenizer from the metadata of a GGUF file, with the tokens exactly as they stand there.

Two kinds are known. "gpt2" is byte-level BPE: tokens spelled in GPT-2's byte alphabet, merges in the file. "llama" is SentencePiece
BPE, as Llama 2, Mistral and Gemma use it: tokens with scores, "▁" for a space, `<0xNN>` for bytes that no token covers; its merges
follow from the scores. Source: the keys `tokenizer.ggml.*` of the GGUF specification.
"""

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE

from headrace.engine.checkpoint.wording import in_line
from headrace.engine.errors import UserError
from headrace.tokenizer_proc.parts import Parts
from headrace.tokenizer_proc.pretokenizers import CUTS

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
"""Values of `tokenizer.ggml.token_type` that name added tokens; 1 is normal, 5 unused, 6 a byte."""

LONGEST_TOKEN = 512
"""Characters of a SentencePiece token; published vocabularies have a tenth of it. Looking for the ways to make one takes its square."""

SPACE = "▁"
"""How SentencePiece spells a space."""


def parts_from_metadata(metadata: Mapping[str, Any], path: str) -> Parts:
    """The tokenizer that `metadata` describes. UserError, naming `path`, when there is none or it is of an unknown kind."""
    model = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if model is None or not tokens:
        raise UserError(f"{path} holds no tokenizer (tokenizer.ggml.model and .tokens): convert the model again with its vocabulary")
    if model == "gpt2":
        backend, adds_bos = _byte_level(metadata, tokens, path), _cut(metadata, path).adds_bos
    elif model == "llama":
        backend, adds_bos = _sentencepiece(metadata, tokens, path), True
    else:
        raise UserError(f"{path} has a tokenizer of kind {model!r}: use a model whose tokenizer is of kind gpt2 or llama")
    _add_tokens(backend, metadata, tokens)
    ids = {name: _token_id(metadata, key, tokens, path) for name, key in _NAMES.items()}
    bos, eos = ids["bos_token"], ids["eos_token"]
    return Parts(
        backend,
        prefix=(bos,) if metadata.get("tokenizer.ggml.add_bos_token", adds_bos) and bos is not None else (),
        suffix=(eos,) if metadata.get("tokenizer.ggml.add_eos_token", False) and eos is not None else (),
        templates=_templates(metadata),
        names={name: tokens[token] for name, token in ids.items() if token is not None},
    )


_NAMES = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], path: str) -> Tokenizer:
    cut = _cut(metadata, path)
    # The left half may itself begin with a space, so its first character is no separator.
    merges = [(merge[: (middle := merge.find(" ", 1))], merge[middle + 1 :]) for merge in metadata.get("tokenizer.ggml.merges", ())]
    backend = Tokenizer(_bpe(tokens, merges, path, ignore_merges=cut.whole_words))
    if cut.composed:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = cut.build()
    backend.decoder = decoders.ByteLevel()
    return backend


def _cut(metadata: Mapping[str, Any], path: str):
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in CUTS:
        raise UserError(
            f"{path} needs the pre-tokenizer {name!r}, which is not built in: use a model with one of {', '.join(sorted(CUTS))}"
        )
    return CUTS[name]


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str], path: str) -> Tokenizer:
    scores = metadata.get("tokenizer.ggml.scores")
    if not scores or len(scores) != len(tokens):
        raise UserError(f"{path} has {len(scores or ())} token scores for {len(tokens)} tokens: the file is damaged, get it again")
    if (longest := max(map(len, tokens))) > LONGEST_TOKEN:
        raise UserError(f"{path} has a token of {longest} characters: at most {LONGEST_TOKEN} are possible")
    unknown = _token_id(metadata, "tokenizer.ggml.unknown_token_id", tokens, path)
    unknown_token = None if unknown is None else tokens[unknown]
    backend = Tokenizer(_bpe(tokens, merges_by_score(tokens, scores), path, byte_fallback=True, fuse_unk=True, unk_token=unknown_token))
    spaces = normalizers.Replace(" ", SPACE)
    decoding: list = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        # A space stands before the text and before what follows an added token; decoding takes the first one away again.
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces])
        decoding.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = spaces
    backend.decoder = decoders.Sequence(decoding)
    return backend


def merges_by_score(tokens: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, best score first: the order in which SentencePiece merges."""
    known = set(tokens)
    found = []
    for token, score in zip(tokens, scores, strict=True):
        for middle in range(1, len(token)):
            left, right = token[:middle], token[middle:]
            if left in known and right in known:
                found.append((-score, -middle, left, right))
    found.sort(key=lambda merge: merge[:2])
    return [(left, right) for _, _, left, right in found]


def _bpe(tokens: list[str], merges: list[tuple[str, str]], path: str, **options: Any) -> BPE:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    try:
        return BPE(vocabulary, merges, **options)
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(f"{path} has a broken vocabulary ({in_line(error)}): the file is damaged, get it again") from None


def _add_tokens(backend: Tokenizer, metadata: Mapping[str, Any], tokens: list[str]) -> None:
    """Tokens that are found in text whole, before anything is merged."""
    special, plain = [], []
    for token, kind in zip(tokens, metadata.get("tokenizer.ggml.token_type") or (), strict=False):
        if not token:
            continue
        if kind in (CONTROL, UNKNOWN):
            special.append(AddedToken(token, normalized=False, special=True))
        elif kind == USER_DEFINED:
            plain.append(AddedToken(token, normalized=False, special=False))
    backend.add_tokens(plain)
    backend.add_special_tokens(special)


def _token_id(metadata: Mapping[str, Any], key: str, tokens: list[str], path: str) -> int | None:
    token = metadata.get(key)
    if token is None or 0 <= token < len(tokens):
        return token
    raise UserError(f"{path} says {key}={token}, but has {len(tokens)} tokens: the file is damaged, get it again")


def _templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    templates = {
        name: metadata[f"tokenizer.chat_template.{name}"]
        for name in metadata.get("tokenizer.chat_templates", ())
        if f"tokenizer.chat_template.{name}" in metadata
    }
    if "tokenizer.chat_template" in metadata:
        templates["default"] = metadata["tokenizer.chat_template"]
    if wrong := [name for name, source in templates.items() if not isinstance(source, str)]:
        raise TypeError(f"the chat template {wrong[0]!r} is no text")
    return templates
