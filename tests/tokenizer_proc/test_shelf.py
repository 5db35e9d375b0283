"""What is put on the shelf is found by every tokenizer of the engine, for a while."""

import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from headrace.engine.messages.frontend import End, Generate, TextPrompt, TokenPrompt
from headrace.engine.messages.sampling import Sampling
from headrace.tokenizer_proc import shelf as shelves
from headrace.tokenizer_proc.shelf import KEPT_S, Shelf

END = End(8, "stop", None, 3, 2, 0, 0.0)


def live(
    answer: str = "a", place: int = 1, tokens: tuple[int, ...] = (1, 2), end: End | None = END, notes: bytes = b"notes", tenant: str = ""
):
    """A request as the tokenizer has it."""
    generate = Generate(
        requests=(7, 8),
        seeds=(1, 2),
        prompt=TextPrompt("text"),
        sampling=Sampling(),
        answer=answer,
        first_choice=2,
        notes=notes,
        tenant=tenant,
    )
    return SimpleNamespace(
        generate=generate, request=7 + place, place=place, submit=SimpleNamespace(prompt=[5, 6, 7]), tokens=list(tokens), end=end
    )


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path)


def test_any_tokenizer_finds_a_record_and_it_says_all_that_is_needed(shelf, tmp_path):
    shelf.put(live())
    (kept,) = Shelf(tmp_path).find("", "a")
    generate = kept.generate
    assert (generate.requests, generate.seeds, generate.first_choice) == ((8,), (2,), 3)
    assert (generate.prompt, generate.emitted, kept.end) == (TokenPrompt((5, 6, 7)), ((1, 2),), END)


def test_choices_are_kept_one_by_one_and_the_last_word_on_each_counts(shelf):
    shelf.put(live(place=0, end=None))
    shelf.put(live(place=1, end=None, tokens=(1,)))
    shelf.put(live(place=1))
    found = {one.generate.first_choice: one for one in shelf.find("", "a")}
    assert {choice: one.end for choice, one in found.items()} == {2: None, 3: END}


def test_nobody_finds_what_is_anothers_or_what_left_no_notes(shelf):
    shelf.put(live(tenant="one"))
    shelf.put(live(answer="b", notes=b""))
    assert shelf.find("two", "a") == shelf.find("", "a") == shelf.find("", "b") == []
    assert shelf.find("one", "*") == shelf.find("one", "../a") == []


def test_records_are_not_found_when_they_are_old_and_go_with_the_next_sweep(shelf, tmp_path, monkeypatch):
    shelf.put(live())
    (path,) = (tmp_path / "answers").iterdir()
    then = time.time() - KEPT_S - 1
    os.utime(path, (then, then))
    assert shelf.find("", "a") == []
    monkeypatch.setattr(shelves, "SWEEP_S", -1.0)
    shelf.put(live("b"))
    assert not path.exists()
    assert len(shelf.find("", "b")) == 1


def test_the_oldest_go_when_there_is_too_much(shelf, tmp_path, monkeypatch):
    monkeypatch.setattr(shelves, "MOST_BYTES", 4000)
    for number in range(100):
        shelf.put(live(str(number)))
        for path in (tmp_path / "answers").iterdir():
            if path.stat().st_mtime > time.time() - 1000:
                os.utime(path, (time.time() - 50 + number / 10,) * 2)
    size = sum(path.stat().st_size for path in (tmp_path / "answers").iterdir())
    assert 0 < size <= 4500
    assert shelf.find("", "99")
    assert not shelf.find("", "0")


def test_a_folder_that_cannot_be_written_costs_records_alone(shelf, tmp_path, monkeypatch):
    monkeypatch.setattr(shelves, "SWEEP_S", -1.0)
    (tmp_path / "answers").rmdir()
    (tmp_path / "answers").touch()
    shelf.put(live())
    (tmp_path / "answers").unlink()
    assert shelf.find("", "a") == []
