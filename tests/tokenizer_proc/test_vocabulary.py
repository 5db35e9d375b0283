"""Encoding and decoding, from GGUF metadata and from Hugging Face directories, against the tokenizers that the vocabularies came from."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers import models as bpe

from headrace.engine.errors import UserError
from headrace.tokenizer_proc import vocabulary
from headrace.tokenizer_proc.huggingface import parts_from_directory
from headrace.tokenizer_proc.rejection import Rejection
from headrace.tokenizer_proc.vocabulary import Tokenizer as OurTokenizer
from tests.tokenizer_proc import samples

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def split(pattern):
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


KINDS = {
    "gpt-2": lambda: samples.train_byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "smollm": lambda: samples.train_byte_level(
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    ),
    "llama-bpe": lambda: samples.train_byte_level(split(LLAMA3), ignore_merges=True),
    "qwen2": lambda: samples.train_byte_level(split(QWEN2), normalizers.NFC()),
}

WITH_SPECIAL = [*samples.TEXTS, "<|start|>user\nhi<|end|>", "x<|end|>", "<think> so </think>", "< |end|> <|END|>"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_byte_level_vocabulary_in_gguf_gives_the_tokens_of_the_tokenizer_it_came_from(kind):
    original = KINDS[kind]()
    ours = samples.from_metadata(samples.byte_level_metadata(original, kind))
    for text in WITH_SPECIAL:
        ids = original.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, add_special=False) == ids, text
        assert ours.decode(ids) == original.decode(ids, skip_special_tokens=False)
        assert ours.decode(ids, skip_special=True) == original.decode(ids, skip_special_tokens=True)
        assert ours.pieces(ids) == [original.id_to_token(token) for token in ids]


def test_bos_and_eos_are_added_as_the_file_says_or_as_its_kind_does():
    metadata = samples.byte_level_metadata(KINDS["llama-bpe"](), "llama-bpe")
    bare = samples.from_metadata(metadata).encode("hi", add_special=False)
    assert samples.from_metadata(metadata).encode("hi", add_special=True) == [0, *bare]
    said = metadata | {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": True}
    assert samples.from_metadata(said).encode("hi", add_special=True) == [*bare, 1]
    gpt2 = samples.byte_level_metadata(KINDS["gpt-2"](), "gpt-2")
    assert samples.from_metadata(gpt2).encode("hi", add_special=True) == samples.from_metadata(gpt2).encode("hi", add_special=False)


@pytest.mark.parametrize("space_prefix", [True, False])
def test_a_sentencepiece_vocabulary_is_merged_by_score_with_bytes_for_the_rest(space_prefix):
    metadata = samples.sentencepiece_metadata(space_prefix)
    ours = samples.from_metadata(metadata)
    for text in samples.TEXTS:
        ids = ours.encode(text, add_special=False)
        assert ids == samples.sentencepiece_encode(text, metadata), text
        assert ours.decode(ids) == text
        assert ours.decode(ids) == ours.backend.decode(ids, skip_special_tokens=False)
    assert ours.encode("cat", add_special=True)[0] == 1


def test_sentencepiece_special_and_user_tokens_are_found_in_text():
    ours = samples.from_metadata(samples.sentencepiece_metadata())
    tool = ours.vocab_size - 1
    ids = ours.encode("<s>the cat<tool></s>", add_special=False)
    assert ids[0] == 1 and ids[-2:] == [tool, 2]
    assert ours.decode(ids) == "<s> the cat<tool></s>"
    assert ours.decode(ids, skip_special=True) == "the cat<tool>"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokenizer.ggml.model": "t5"}, "'t5'"),
        ({"tokenizer.ggml.pre": "mystery"}, "'mystery'"),
        ({"tokenizer.ggml.tokens": []}, "no tokenizer"),
        ({"tokenizer.ggml.merges": ["no such"]}, "broken vocabulary"),
        ({"tokenizer.ggml.eos_token_id": 10_000}, "eos_token_id=10000"),
    ],
)
def test_a_vocabulary_that_cannot_be_used_is_refused_by_name(change, said):
    metadata = samples.byte_level_metadata(KINDS["gpt-2"](), "gpt-2") | change
    with pytest.raises(UserError, match=said):
        samples.from_metadata(metadata)


def test_the_default_model_encodes_as_its_authors_tokenizer_does():
    # Reference ids of SmolLM2's own tokenizer.json: digits alone, whitespace before a digit kept together.
    known = {
        "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
        "Café déjà vu.": [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30],
        "  multiple   spaces": [216, 2701, 256, 5600],
        "The capital of France is": [504, 3575, 282, 4649, 314],
    }
    tokenizer = samples.default_tokenizer()
    for text, ids in known.items():
        assert tokenizer.encode(text, add_special=True) == ids
    for text in samples.TEXTS:
        assert tokenizer.decode(tokenizer.encode(text, add_special=False)) == text
    chat = "<|im_start|>user\nhi<|im_end|>\n"
    assert tokenizer.encode(chat, add_special=False)[0] == 1
    assert tokenizer.decode(tokenizer.encode(chat, add_special=False), skip_special=True) == "user\nhi\n"


@pytest.mark.slow
def test_the_default_model_encodes_as_transformers_does():
    from transformers import AutoTokenizer

    path = samples.default_path()
    theirs = AutoTokenizer.from_pretrained(path.rpartition("/")[0], gguf_file=path.rpartition("/")[2])
    # Transformers leaves SmolLM's digit rule out when it reads a GGUF file; with the rule of the model's tokenizer.json both agree.
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    ours = samples.default_tokenizer()
    for text in [*samples.TEXTS, "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n", "a<|endoftext|>b<repo_name>"]:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text, add_special=True) == ids, text
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)
        assert ours.decode(ids, skip_special=True) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def llama2_json() -> Tokenizer:
    """A Llama 2 tokenizer.json in small."""
    metadata = samples.sentencepiece_metadata()
    from headrace.tokenizer_proc.gguf import merges_by_score

    tokens = metadata["tokenizer.ggml.tokens"]
    merges = merges_by_score(tokens, metadata["tokenizer.ggml.scores"])
    vocabulary = {token: place for place, token in enumerate(tokens)}
    tokenizer = Tokenizer(bpe.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def save(directory, tokenizer: Tokenizer, config: dict | None = None):
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def test_a_directory_gives_the_tokens_and_the_text_of_its_tokenizer_json(tmp_path):
    original = llama2_json()
    parts = parts_from_directory(save(tmp_path, original, {"bos_token": "<s>", "eos_token": {"content": "</s>"}}))
    ours = OurTokenizer(parts, 1000, 512)
    assert parts.names == {"bos_token": "<s>", "eos_token": "</s>"}
    for text in [*samples.TEXTS, "<s>a b</s> c"]:
        ids = original.encode(text).ids
        assert ours.encode(text, add_special=True) == ids
        assert ours.decode(ids, skip_special=True) == original.decode(ids)


def test_the_configuration_beside_a_tokenizer_decides_about_bos_and_eos(tmp_path):
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    no_bos = parts_from_directory(save(tmp_path / "a", llama2_json(), names | {"add_bos_token": False, "add_eos_token": True}))
    assert (no_bos.prefix, no_bos.suffix) == ((), (2,))
    silent = parts_from_directory(save(tmp_path / "b", llama2_json(), names))
    assert (silent.prefix, silent.suffix) == ((1,), ())


def test_tokens_that_only_the_configuration_names_are_added(tmp_path):
    config = {"added_tokens_decoder": {"5000": {"content": "<|eot|>", "special": True}}, "pad_token": "<tool>"}
    parts = parts_from_directory(save(tmp_path, llama2_json(), config))
    ours = OurTokenizer(parts, 10_000, 512)
    ids = ours.encode("a<|eot|><tool>", add_special=False)
    assert ours.pieces(ids)[-2:] == ["<|eot|>", "<tool>"]
    assert ours.decode(ids, skip_special=True) == "a"


def test_a_template_is_found_wherever_it_lies(tmp_path):
    config = {"chat_template": [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]}
    directory = save(tmp_path, llama2_json(), config)
    assert parts_from_directory(directory).templates == {"default": "A", "tool_use": "B"}
    (directory / "chat_template.json").write_text('{"chat_template": "C"}')
    assert parts_from_directory(directory).templates == {"default": "C"}
    (directory / "chat_template.jinja").write_text("D")
    assert parts_from_directory(directory).templates == {"default": "D"}


@pytest.mark.parametrize(("name", "content"), [("tokenizer.json", "{"), ("tokenizer_config.json", "[]"), ("tokenizer_config.json", "{")])
def test_a_broken_file_is_named(tmp_path, name, content):
    directory = save(tmp_path, llama2_json(), {})
    (directory / name).write_text(content)
    with pytest.raises(UserError, match=name):
        parts_from_directory(directory)


def test_a_directory_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        parts_from_directory(tmp_path)


def test_ids_outside_of_the_vocabulary_and_broken_unicode_are_refused():
    tokenizer = samples.default_tokenizer()
    with pytest.raises(Rejection, match="token id 49152, the vocabulary has ids from 0 to 49151"):
        tokenizer.check([5, 49152], "prompt")
    with pytest.raises(Rejection, match="token id -1"):
        tokenizer.check([-1], "prompt")
    with pytest.raises(Rejection, match="surrogate"):
        tokenizer.encode("\ud800", add_special=False)


def test_an_id_without_a_token_has_no_text():
    tokenizer = OurTokenizer(samples.default_parts(), 60_000, 8192)
    assert tokenizer.decode([55_000, 19556]) == "Hello"


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=5),
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_vocabulary_whose_values_are_of_any_kind_is_read_or_refused_in_one_line(monkeypatch, data):
    good = samples.sentencepiece_metadata() if data.draw(st.booleans()) else samples.small_byte_level_metadata()
    metadata = good | {"tokenizer.chat_template": "x", "tokenizer.chat_templates": ["y"], "tokenizer.chat_template.y": "z"}
    for key in data.draw(st.lists(st.sampled_from(sorted(metadata)), min_size=1, max_size=2)):
        kind = data.draw(st.sampled_from(["any", "within"]))
        if kind == "within" and isinstance(metadata[key], list) and metadata[key]:
            changed = list(metadata[key])
            changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(values)
            metadata[key] = changed
        else:
            metadata[key] = data.draw(values)
    monkeypatch.setattr(vocabulary, "GGUFFile", lambda path: type("File", (), {"metadata": metadata}))
    try:
        vocabulary.load_parts(samples.default_model())
    except UserError as error:
        assert samples.default_path() in str(error)
        assert "\n" not in str(error)


def test_a_token_whose_halves_would_be_looked_for_for_ever_is_refused():
    metadata = samples.sentencepiece_metadata()
    tokens = [*metadata["tokenizer.ggml.tokens"][:-1], "x" * 10_000_000]
    with pytest.raises(UserError, match="a token of 10000000 characters"):
        samples.from_metadata(metadata | {"tokenizer.ggml.tokens": tokens})
