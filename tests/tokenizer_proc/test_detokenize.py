"""Streams of text from streams of ids: nothing broken, nothing lost, the same as decoding everything at once."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers import models as bpe

from headrace.tokenizer_proc.detokenize import text_stream
from headrace.tokenizer_proc.parts import Parts
from headrace.tokenizer_proc.spelling import Spelling
from headrace.tokenizer_proc.vocabulary import Tokenizer as OurTokenizer
from tests.tokenizer_proc import samples


def streamed(tokenizer, ids, skip_special=False, prompt=()):
    stream = text_stream(tokenizer.spelling, skip_special, prompt)
    return [stream.add(token) for token in ids]


@given(st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_text_comes_back_from_its_tokens_with_no_broken_character_on_the_way(text):
    byte_level = samples.from_metadata(samples.small_byte_level_metadata())
    for tokenizer in (byte_level, samples.from_metadata(samples.sentencepiece_metadata(False))):
        pieces = streamed(tokenizer, tokenizer.encode(text, add_special=False))
        assert "".join(pieces) == text
        assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(0, 49151), max_size=40), st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_tokens_stream_to_the_text_that_decoding_them_gives(ids, skip_special):
    tokenizer = samples.default_tokenizer()
    text = "".join(streamed(tokenizer, ids, skip_special))
    whole = tokenizer.backend.decode(ids, skip_special_tokens=skip_special)
    assert tokenizer.decode(ids, skip_special) == whole
    # An incomplete character at the end is dropped from the stream; decoding shows it as one U+FFFD.
    assert whole in (text, text + "\ufffd")


@given(st.lists(st.integers(0, 400), max_size=30), st.booleans())
@settings(max_examples=200, deadline=None)
def test_sentencepiece_tokens_stream_to_what_decoding_gives(ids, skip_special):
    tokenizer = samples.from_metadata(samples.sentencepiece_metadata())
    ids = [token % tokenizer.vocab_size for token in ids]
    text = "".join(streamed(tokenizer, ids, skip_special))
    assert tokenizer.decode(ids, skip_special) in (text, text + "\ufffd")


def test_a_character_split_over_tokens_appears_with_its_last_one():
    tokenizer = samples.default_tokenizer()
    ids = tokenizer.encode("👩‍👩‍👧‍👦", add_special=False)
    assert len(ids) > 4
    pieces = streamed(tokenizer, ids)
    assert "" in pieces
    assert "".join(pieces) == "👩‍👩‍👧‍👦"
    assert "".join(streamed(tokenizer, ids[:-1])) == "👩‍👩‍👧‍"


def test_bytes_that_are_no_character_are_replaced_once_that_is_certain():
    tokenizer = samples.from_metadata(samples.sentencepiece_metadata(False))
    byte = tokenizer.backend.token_to_id
    ids = [byte("<0xE2>"), byte("<0x82>"), byte("t"), byte("<0xFF>"), byte("<0xE2>"), byte("<0x82>"), byte("<0xAC>")]
    assert streamed(tokenizer, ids) == ["", "", "\ufffdt", "\ufffd", "", "", "€"]


def test_what_no_character_begins_with_is_not_waited_for():
    tokenizer = samples.from_metadata(samples.sentencepiece_metadata(False))
    beginnings = {chr(code).encode()[:2] for code in [*range(0xD800), *range(0xE000, 0x110000)] if code >= 0x800}
    for lead in range(0xE0, 0x100):
        for second in range(0x80, 0xC0):
            pieces = streamed(tokenizer, [tokenizer.backend.token_to_id(f"<0x{byte:02X}>") for byte in (lead, second)])
            assert "".join(pieces) == ("" if bytes([lead, second]) in beginnings else "\ufffd\ufffd")


def test_the_first_space_of_sentencepiece_is_kept_after_a_prompt_and_dropped_without_one():
    tokenizer = samples.from_metadata(samples.sentencepiece_metadata())
    ids = tokenizer.encode("the cat", add_special=False)
    prompt = tokenizer.encode("the", add_special=True)
    assert "".join(streamed(tokenizer, ids, True, prompt)) == " the cat"
    assert "".join(streamed(tokenizer, ids, True, [1])) == "the cat"
    assert "".join(streamed(tokenizer, ids, False, [1])) == " the cat"
    assert "".join(streamed(tokenizer, [2, *ids], True, [1])) == "the cat"


def test_special_tokens_are_shown_when_they_are_not_skipped():
    tokenizer = samples.default_tokenizer()
    ids = tokenizer.encode("a<|im_end|>b", add_special=False)
    assert streamed(tokenizer, ids, False) == ["a", "<|im_end|>", "b"]
    assert streamed(tokenizer, ids, True) == ["a", "", "b"]


@pytest.mark.parametrize(
    ("decoder", "tokens", "text"),
    [
        (decoders.Metaspace(), ["▁the", "▁ca", "t"], "the cat"),
        (decoders.WordPiece(), ["the", "ca", "##t"], "the cat"),
        (decoders.BPEDecoder("</w>"), ["the</w>", "ca", "t</w>"], "the cat"),
    ],
)
def test_other_decoders_stream_as_the_library_decodes(decoder, tokens, text):
    backend = Tokenizer(bpe.BPE({token: place for place, token in enumerate(tokens)}, []))
    backend.decoder = decoder
    tokenizer = OurTokenizer(Parts(backend), len(tokens), 16)
    assert backend.decode([0, 1, 2]) == text
    assert tokenizer.decode([0, 1, 2]) == text
    assert "".join(streamed(tokenizer, [0, 1, 2])) == text


def test_a_tokens_bytes_and_text_are_known_even_when_it_is_half_a_character():
    tokenizer = samples.default_tokenizer()
    spelling = Spelling(tokenizer.backend)
    ids = tokenizer.encode("👩", add_special=False)
    assert b"".join(spelling.bytes_of(token) for token in ids) == "👩".encode()
    assert "\ufffd" in spelling.text_of(ids[0])
