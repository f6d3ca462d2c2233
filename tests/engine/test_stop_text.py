"""Stop texts in a stream: the same text comes out however it is cut into pieces, and nothing is held longer than needed."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashsvd_jax.stop_text import StopText

few_letters = st.text(alphabet="abc", min_size=1, max_size=4)
many = settings(max_examples=400, deadline=None, derandomize=True)


def shown(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    stop = StopText(stops)
    text = "".join(map(stop.add, pieces))
    return text + stop.finish(), stop.found


def expected(text: str, stops: list[str]) -> tuple[str, bool]:
    """Up to the first stop text to be complete; of several that end there, the longest."""
    for end in range(1, len(text) + 1):
        ending = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(ending)], True
    return text, False


@many
@given(st.lists(st.text(alphabet="abc", max_size=5), max_size=8), st.lists(few_letters, max_size=3))
def test_any_split_gives_the_text_up_to_the_first_stop(pieces: list[str], stops: list[str]) -> None:
    assert shown(pieces, stops) == expected("".join(pieces), stops)


@many
@given(st.lists(st.text(max_size=5), max_size=8), st.lists(st.text(min_size=1, max_size=3), max_size=3))
def test_any_characters(pieces: list[str], stops: list[str]) -> None:
    assert shown(pieces, stops) == expected("".join(pieces), stops)


@many
@given(st.text(alphabet="ab", max_size=20), st.lists(st.text(alphabet="ab", min_size=1, max_size=6), max_size=3))
def test_only_what_may_begin_a_stop_text_is_held_back(text: str, stops: list[str]) -> None:
    stop, out = StopText(stops), ""
    for end in range(1, len(text) + 1):
        out += stop.add(text[end - 1])
        if stop.found:
            return
        held = text[len(out) : end]
        assert text.startswith(out)
        assert not held or any(len(held) < len(s) and s.startswith(held) for s in stops)


@pytest.mark.parametrize(
    ("pieces", "stops", "want"),
    [
        (["abc", "def"], [], "abcdef"),
        (["ab", "cd", "ef"], ["bcde"], "a"),
        (["END", "more"], ["END"], ""),
        (["a", "b"], ["ab"], ""),
        (["aaa", "ab"], ["aab"], "aa"),  # a false start inside the held text
        (["x a", "abaa", "bab"], ["aabab"], "x aab"),
        (["ab", "c"], ["abcd", "bc"], "a"),  # the one complete first, while a longer one is held back
        (["xab", "c"], ["abc", "c"], "x"),  # of two that end together, the longer
        (["ab"], ["abc"], "ab"),  # held back, and given at the end
        (["\n", "\n"], ["\n\n"], ""),
    ],
)
def test_examples(pieces: list[str], stops: list[str], want: str) -> None:
    assert shown(pieces, stops)[0] == want
    assert shown(["".join(pieces)], stops)[0] == want


def test_nothing_is_shown_after_a_stop_text() -> None:
    stop = StopText(["."])
    assert stop.add("one. two") == "one"
    assert (stop.add("."), stop.add("three"), stop.finish(), stop.found) == ("", "", "", True)


def test_finish_gives_what_was_held_back_once() -> None:
    stop = StopText(["<end>"])
    assert stop.add("text <en") == "text "
    assert (stop.finish(), stop.finish(), stop.found) == ("<en", "", False)
