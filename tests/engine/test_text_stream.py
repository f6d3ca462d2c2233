"""Decoding token by token gives what decoding at once gives, and no piece ends inside a character."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashsvd_jax.tokenizer import TextStream, Tokenizer

REPLACEMENT = "\ufffd"
MIXED = "où? Ærø, 東京 ハル 🦊🦊🚀 — a  b\n\n\tend"

many = settings(max_examples=150, deadline=None, derandomize=True)


@pytest.fixture(params=["tokenizer", "sentencepiece_tokenizer"], scope="module")
def either(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)


def stream_pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """The pieces of all tokens, and what the end adds."""
    stream = tokenizer.stream()
    return [*map(stream.add, ids), stream.finish()]


@many
@given(ids=st.lists(st.integers(0, 330), max_size=40))
def test_any_tokens_of_a_byte_level_tokenizer(tokenizer: Tokenizer, ids: list[int]) -> None:
    """Bytes that form no character and ids that the tokenizer does not know included."""
    pieces = stream_pieces(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert not any(piece.endswith(REPLACEMENT) for piece in pieces[:-1])


@many
@given(text=st.text(max_size=25))
def test_any_text(either: Tokenizer, text: str) -> None:
    ids = either.encode(text)
    pieces = stream_pieces(either, ids)
    assert "".join(pieces) == either.decode(ids)
    if REPLACEMENT not in text:
        assert not any(REPLACEMENT in piece for piece in pieces)


def test_text_comes_back_as_it_was(either: Tokenizer) -> None:
    ids = either.encode(MIXED)
    assert len(ids) > len(MIXED)  # some characters take several tokens
    assert "".join(stream_pieces(either, ids)) == MIXED


def test_each_character_comes_with_its_last_byte(either: Tokenizer) -> None:
    ids = either.encode("ab🦊c")
    pieces = stream_pieces(either, ids)
    assert "".join(pieces) == "ab🦊c"
    assert pieces[pieces.index("🦊") - 1] == ""
    assert pieces[-2:] == ["c", ""]


def test_words_keep_the_space_before_them(sentencepiece_tokenizer: Tokenizer) -> None:
    ids = sentencepiece_tokenizer.encode("the the  a too")
    assert stream_pieces(sentencepiece_tokenizer, ids)[0] == "the"
    assert "".join(stream_pieces(sentencepiece_tokenizer, ids)) == "the the  a too"
    assert "".join(stream_pieces(sentencepiece_tokenizer, ids[1:])) == sentencepiece_tokenizer.decode(ids[1:])


def test_an_unfinished_character_is_shown_as_a_replacement_at_the_end(either: Tokenizer) -> None:
    ids = either.encode("ok日")[:-1]
    pieces = stream_pieces(either, ids)
    assert "".join(pieces[:-1]) == "ok"
    assert pieces[-1] and set(pieces[-1]) == {REPLACEMENT}


def test_special_tokens_are_no_text(either: Tokenizer) -> None:
    (end,) = either.end_ids
    ids, more = either.encode("a😀"), either.encode("b")
    assert "".join(stream_pieces(either, [end, *ids, end, *more])) == either.decode([*ids, *more])


def test_the_cost_of_a_token_does_not_grow(either: Tokenizer) -> None:
    decoded = 0

    class Counting:
        def decode(self, ids: list[int]) -> str:
            nonlocal decoded
            decoded += len(ids)
            return either.decode(ids)

    ids = either.encode("the quick brown fox " * 50)
    stream = TextStream(Counting())  # type: ignore[arg-type]
    assert len("".join(map(stream.add, ids))) == 1000 and decoded < 6 * len(ids)
