"""Stop strings in text that comes in pieces."""

from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.tokenizer_proc.stops import StopFinder


def run(stops, pieces, include=False):
    """What is shown after each piece, until a match; and the match."""
    finder = StopFinder(tuple(stops), include)
    shown = []
    for piece in pieces:
        shown.append(finder.feed(piece))
        if finder.matched is not None:
            return shown, finder.matched
    return [*shown, finder.rest()], None


def test_a_stop_over_several_pieces_is_found_and_its_beginning_never_shown():
    assert run(["the End"], ["and th", "e En", "d. More"]) == (["and ", "", ""], "the End")


def test_a_false_beginning_is_shown_as_soon_as_it_is_clear():
    assert run(["\n\nUser"], ["a\n", "\n", "Us", "her"]) == (["a", "", "", "\n\nUsher", ""], None)


def test_what_is_held_back_at_the_end_is_text():
    assert run(["stop"], ["non", "-st"]) == (["non", "-", "st"], None)


def test_an_included_stop_ends_the_text():
    assert run(["END"], ["xE", "ND y"], include=True) == (["x", "END"], "END")


def test_the_match_that_ends_first_wins_and_of_those_the_longest():
    assert run(["abcd", "bc"], ["xabcdy"]) == (["xa"], "bc")
    assert run(["c", "abc"], ["xabc"]) == (["x"], "abc")


def test_a_beginning_within_a_failed_beginning_is_still_held():
    assert run(["aab"], ["a", "a", "a", "b"]) == (["", "", "a", ""], "aab")


def brute_force(stops, text, include):
    matches = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in stops if stop in text]
    if not matches:
        return text, None
    end, start, stop = min(matches)
    return text[: end if include else start], stop


@given(
    st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=4, unique=True),
    st.lists(st.text("ab\n", max_size=3), max_size=12),
    st.booleans(),
)
@settings(max_examples=500, deadline=None)
def test_the_pieces_do_not_matter(stops, pieces, include):
    shown, matched = run(stops, pieces, include)
    assert ("".join(shown), matched) == brute_force(stops, "".join(pieces), include)


@given(st.text("ab", min_size=1, max_size=4), st.text("ab", max_size=20))
@settings(max_examples=300, deadline=None)
def test_only_what_could_begin_a_stop_is_held_back(stop, text):
    shown, matched = run([stop], text)
    if matched is None:
        held = max(n for n in range(len(stop)) if text.endswith(stop[:n]))
        assert len("".join(shown[:-1])) == len(text) - held
