"""Text in, text out: pieces, stop texts, ends, log-probabilities, statistics, and what is refused."""

import copy
import dataclasses
import time
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from flashsvd_jax.errors import RequestError
from flashsvd_jax.generation import Completion, Piece, batch_generate, generate, stream_generate
from flashsvd_jax.model import Model
from flashsvd_jax.sampling import SamplingParams
from flashsvd_jax.tokenizer import Tokenizer

PROMPTS = ["the quick", "naïve café", "日本"]
NEW = 30
REPLACEMENT = "\ufffd"


@pytest.fixture(scope="module")
def models(tiny: Any, tokenizer: Tokenizer) -> dict[int, Model]:
    """The model at several numbers of tokens a dispatch."""
    return {k: Model(tiny.config, tiny.weights, tokenizer, decode_chunk=k) for k in (8, 3)}


@pytest.fixture(scope="module")
def model(models: dict[int, Model]) -> Model:
    return models[8]


@pytest.fixture(scope="module")
def whole(model: Model) -> list[Completion]:
    """One completion for each of some seeds, none of them stopped."""
    return [complete(model, seed=seed) for seed in range(6)]


def complete(model: Model, prompt: Any = PROMPTS[0], **options: Any) -> Completion:
    return batch_generate(model, [prompt], **{"max_tokens": NEW, **options})[0]


def joined(pieces: list[Piece]) -> tuple[str, tuple[int, ...], str | None]:
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    ids = tuple(token for piece in pieces for token in piece.token_ids)
    return "".join(piece.text for piece in pieces), ids, pieces[-1].finish_reason


def content(completion: Completion) -> tuple[str, tuple[int, ...], str]:
    return completion.text, completion.token_ids, completion.finish_reason


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"seed": 1}, {"seed": 2, "top_p": 0.7, "top_k": 50}])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_generate_stream_and_batch_give_the_text_of_all_tokens(
    model: Model, prompt: str, options: dict[str, Any]
) -> None:
    completion = complete(model, prompt, **options)
    assert len(completion.token_ids) == NEW and completion.finish_reason == "length"
    assert completion.text == model.tokenizer.decode(completion.token_ids)
    assert generate(model, prompt, max_tokens=NEW, **options) == completion.text
    assert generate(model, prompt, SamplingParams(max_tokens=NEW, **options)) == completion.text
    pieces = list(stream_generate(model, prompt, max_tokens=NEW, **options))
    assert [len(piece.token_ids) for piece in pieces] == [1, 8, 8, 8, 5]  # as they come from the device
    assert joined(pieces) == content(completion)


def test_the_texts_of_these_tests_differ_and_hold_back_characters(model: Model, whole: list[Completion]) -> None:
    """Otherwise much of what follows would pass for nothing."""
    assert len({completion.text for completion in whole}) == len(whole)
    streams = [stream_generate(model, PROMPTS[0], seed=seed, max_tokens=NEW) for seed in range(len(whole))]
    pieces = [piece for stream in streams for piece in stream]
    assert any(piece.text != model.tokenizer.decode(piece.token_ids) for piece in pieces)


def test_the_text_does_not_depend_on_the_batch_nor_on_the_tokens_in_a_dispatch(models: dict[int, Model]) -> None:
    params = [SamplingParams(seed=seed, max_tokens=NEW - seed, top_k=40 * seed) for seed in range(3)]
    alone = [content(batch_generate(models[8], [prompt], p)[0]) for prompt, p in zip(PROMPTS, params, strict=True)]
    for model in models.values():
        assert list(map(content, batch_generate(model, PROMPTS, params))) == alone
        turned = batch_generate(model, [*PROMPTS[::-1], "a"], [*params[::-1], SamplingParams(max_tokens=40)])
        assert list(map(content, turned[:3])) == alone[::-1]


def test_one_set_of_options_serves_all_prompts(model: Model) -> None:
    together = batch_generate(model, PROMPTS, seed=4, max_tokens=NEW, stop="e")
    assert list(map(content, together)) == [content(complete(model, prompt, seed=4, stop="e")) for prompt in PROMPTS]


def test_token_ids_are_a_prompt_too(model: Model, whole: list[Completion]) -> None:
    ids = model.tokenizer.encode(PROMPTS[0])
    for prompt in (ids, tuple(ids), np.array(ids)):
        assert content(complete(model, prompt, seed=3)) == content(whole[3])


@pytest.mark.parametrize("length", [1, 2, 3, 6])
def test_a_stop_text_ends_the_completion_wherever_it_begins(model: Model, whole: list[Completion], length: int) -> None:
    """At the very start, in one token, over several, over pieces of the stream."""
    for seed, full in enumerate(whole):
        for start in (0, 1, 5, 11, len(full.text) - length - 1):
            stop = full.text[start : start + length]
            at = full.text.find(stop)
            got = complete(model, seed=seed, stop=stop)
            assert (got.text, got.finish_reason) == (full.text[:at], "stop")
            assert got.token_ids == full.token_ids[: len(got.token_ids)]
            decoded = model.tokenizer.decode(got.token_ids)
            before = model.tokenizer.decode(got.token_ids[:-1])
            assert stop in decoded and not (stop in before and REPLACEMENT not in before)  # not a token too many
            stream = stream_generate(model, PROMPTS[0], seed=seed, max_tokens=NEW, stop=[stop])
            assert joined(list(stream)) == content(got)


def test_of_several_stop_texts_the_first_to_be_complete_counts(model: Model, whole: list[Completion]) -> None:
    for seed, full in enumerate(whole):
        for start in (4, 9, 14):
            text = full.text[start:]
            never, within = text + "x", text[2:4]
            stops = [never, text[:6], text[1:5], within, text[5:6] + text[5:]]
            ends = [(full.text.find(stop) + len(stop), full.text.find(stop)) for stop in stops if stop in full.text]
            assert complete(model, seed=seed, stop=stops).text == full.text[: min(ends)[1]]


def test_a_stop_text_that_never_comes_changes_nothing(model: Model, whole: list[Completion]) -> None:
    for seed, full in enumerate(whole):
        begun = [full.text[-4:] + "!", full.text[-1] + full.text]  # the text ends with their beginnings
        assert content(complete(model, seed=seed, stop=[*begun, "\x00\x00\x00"])) == content(full)


def test_a_stop_text_in_what_is_held_back_to_the_end(model: Model, whole: list[Completion]) -> None:
    """Bytes that form no character become text only when the completion ends."""
    ids = whole[0].token_ids
    decode = model.tokenizer.decode
    count = next(n for n in range(1, NEW) if decode(ids[:n]).endswith(REPLACEMENT))
    got = complete(model, seed=0, max_tokens=count, stop=REPLACEMENT)
    assert content(got) == (decode(ids[:count]).split(REPLACEMENT)[0], ids[:count], "stop")


def test_an_end_token_ends_the_completion_and_is_no_part_of_it(model: Model, whole: list[Completion]) -> None:
    full = whole[1]
    at = next(n for n in range(5, NEW) if full.token_ids.index(full.token_ids[n]) == n)
    end = full.token_ids[at]
    want = (model.tokenizer.decode(full.token_ids[:at]), full.token_ids[:at], "stop")
    assert content(complete(model, seed=1, stop_token_ids=[end])) == want
    as_last = complete(model, seed=1, stop_token_ids=[end], max_tokens=at + 1)
    assert content(as_last) == want
    assert complete(model, seed=1, stop_token_ids=[end], max_tokens=at).finish_reason == "length"
    config = dataclasses.replace(model.config, eos_token_ids=(end,))
    ending = Model(config, model.weights, model.tokenizer)
    assert content(complete(ending, seed=1)) == want
    assert content(complete(ending, seed=1, ignore_eos=True)) == content(full)
    first = complete(model, seed=1, stop_token_ids=[full.token_ids[0]])
    assert content(first) == ("", (), "stop")


def test_rows_end_each_at_their_own_time(model: Model, whole: list[Completion]) -> None:
    params = [
        SamplingParams(seed=0, max_tokens=NEW),
        SamplingParams(seed=1, max_tokens=NEW, stop=whole[1].text[2:5]),
        SamplingParams(seed=2, max_tokens=NEW, stop_token_ids=[whole[2].token_ids[4]]),
        SamplingParams(seed=3, max_tokens=1),
    ]
    got = batch_generate(model, [PROMPTS[0]] * 4, params)
    assert [completion.finish_reason for completion in got] == ["length", "stop", "stop", "length"]
    assert list(map(content, got)) == [content(batch_generate(model, [PROMPTS[0]], p)[0]) for p in params]


def test_without_a_limit_the_cache_is_one(model: Model) -> None:
    ids = [5] * 10
    for limit in (None, 500):
        got = complete(model, ids, max_tokens=limit, seed=0)
        assert (len(got.token_ids), got.finish_reason) == (model.max_length - 10, "length")


def test_a_stream_may_be_left_early(model: Model, whole: list[Completion]) -> None:
    stream = stream_generate(model, PROMPTS[0], seed=0, max_tokens=NEW)
    next(stream)
    del stream
    assert content(complete(model, seed=0)) == content(whole[0])


def test_without_a_tokenizer_there_are_only_token_ids(model: Model, whole: list[Completion]) -> None:
    mute = copy.copy(model)
    mute.tokenizer = None
    got = complete(mute, model.tokenizer.encode(PROMPTS[0]), seed=3)
    assert content(got) == ("", whole[3].token_ids, "length")
    with pytest.raises(RequestError, match="without a tokenizer"):
        complete(mute, "text")
    with pytest.raises(RequestError, match="stop"):
        complete(mute, [1, 2], stop="text")


@pytest.mark.parametrize("best", [0, 1, 5])
def test_logprobs_stand_beside_their_tokens(model: Model, whole: list[Completion], best: int) -> None:
    got = complete(model, seed=2, logprobs=best)
    assert content(got) == content(whole[2])
    assert tuple(entry.token for entry in got.logprobs) == got.token_ids
    for entry in got.logprobs:
        values = list(entry.top.values())
        assert len(values) == best and values == sorted(values, reverse=True)
        assert entry.logprob < 0 and all(entry.logprob <= value for value in values if entry.token not in entry.top)
        assert entry.top.get(entry.token, entry.logprob) == entry.logprob
    assert len({entry.logprob for entry in got.logprobs}) > NEW // 2
    stopped = complete(model, seed=2, logprobs=best, stop=got.text[6:9])
    assert stopped.logprobs == got.logprobs[: len(stopped.token_ids)]
    pieces = list(stream_generate(model, PROMPTS[0], seed=2, max_tokens=NEW, logprobs=best))
    assert [len(piece.logprobs) for piece in pieces] == [len(piece.token_ids) for piece in pieces]


def test_logprobs_only_for_those_who_ask(model: Model) -> None:
    params = [SamplingParams(seed=1, max_tokens=4, logprobs=best) for best in (None, 2, 0)]
    got = batch_generate(model, PROMPTS, params)
    assert [[len(entry.top) for entry in completion.logprobs] for completion in got] == [[], [2] * 4, [0] * 4]
    alone = complete(model, PROMPTS[1], seed=1, max_tokens=4, logprobs=2)
    for together, entry in zip(got[1].logprobs, alone.logprobs, strict=True):
        assert list(together.top) == list(entry.top)
        assert together.logprob == pytest.approx(entry.logprob, abs=1e-4)


def test_greedy_takes_the_token_of_the_best_logprob(model: Model) -> None:
    for entry in complete(model, temperature=0.0, logprobs=1).logprobs:
        assert entry.top == {entry.token: entry.logprob}


def test_statistics(model: Model, whole: list[Completion]) -> None:
    start = time.perf_counter()
    pieces = list(stream_generate(model, PROMPTS[0], seed=0, max_tokens=NEW))
    wall = time.perf_counter() - start
    last = pieces[-1].statistics
    assert (last.prompt_tokens, last.generated_tokens) == (len(model.tokenizer.encode(PROMPTS[0])), NEW)
    assert last.compiled == 0
    assert last.time_to_first_token > 0 and last.decode_seconds > 0
    assert last.time_to_first_token + last.decode_seconds <= wall
    assert last.tokens_per_second == pytest.approx((NEW - 1) / last.decode_seconds)
    assert [piece.statistics.generated_tokens for piece in pieces] == [1, 9, 17, 25, 30]
    assert {piece.statistics.time_to_first_token for piece in pieces} == {last.time_to_first_token}
    assert pieces[0].statistics.decode_seconds == pieces[0].statistics.tokens_per_second == 0
    assert complete(model, max_tokens=1).statistics.tokens_per_second == 0


def test_statistics_tell_what_was_compiled(tiny: Any, tokenizer: Tokenizer) -> None:
    fresh = Model(tiny.config, tiny.weights, tokenizer)
    assert [complete(fresh, seed=0).statistics.compiled for _ in range(2)] == [4, 0]


def test_engines_are_kept_for_each_power_of_two(model: Model) -> None:
    assert [model.engine(n).batch for n in (1, 2, 3, 4)] == [1, 2, 4, 4]
    assert model.engine(3) is model.engine(4)


def test_a_model_is_at_most_as_long_as_its_positions(tiny: Any, tokenizer: Tokenizer) -> None:
    positions = tiny.config.max_position
    assert Model(tiny.config, tiny.weights, tokenizer).max_length == positions
    assert Model(tiny.config, tiny.weights, max_length=40).engine(1).max_length == 40
    for length in (positions + 1, 0, -3, "40", 40.0):
        with pytest.raises(RequestError, match=f"max_length.* {length!r}"):
            Model(tiny.config, tiny.weights, max_length=length).engine(1)  # type: ignore[arg-type]
    for chunk in (0, "8"):
        with pytest.raises(RequestError, match=f"decode_chunk.* {chunk!r}"):
            Model(tiny.config, tiny.weights, decode_chunk=chunk)  # type: ignore[arg-type]


def test_prompts_and_options_may_be_numpys_and_jaxs(model: Model) -> None:
    ids, options = [3, 4, 5], {"temperature": np.float32(0.0), "max_tokens": np.int64(6), "seed": np.uint32(3)}
    expected = generate(model, ids, temperature=0.0, max_tokens=6, seed=3)
    for given in (np.array(ids), jnp.array(ids), tuple(ids), iter(ids)):
        assert generate(model, given, **options) == expected
    assert [found.text for found in batch_generate(model, (given for given in [ids, ids]), **options)] == [expected] * 2


REFUSED: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "unknown option": (("a",), {"temprature": 0.5}, "unknown option.* temprature.*temperature"),
    "one known, one unknown": (("a",), {"top_k": 3, "beams": 2}, "unknown option.* beams"),
    "bad value": (("a",), {"top_p": 2.0}, "^top_p must be"),
    "value of a wrong type": (("a",), {"temperature": "hot"}, "^temperature must be"),
    "params and keywords": (("a", SamplingParams()), {"top_k": 3}, "top_k"),
    "empty text": (("",), {}, "the prompt is empty"),
    "no token": (([],), {}, "the prompt is empty"),
    "too long": (([1] * 200,), {}, "200 tokens.*: shorten the prompt"),
    "outside the vocabulary": (([1, 5000],), {}, "outside the vocabulary"),
    "texts for one prompt": ((["a", "b"],), {}, "prompt"),
    "not whole numbers": (([1.5, 2.0],), {}, "prompt"),
    "truth values": (([True, False],), {}, "prompt"),
    "bytes": ((b"abc",), {}, "prompt"),
    "an array of fractions": ((np.array([1.0, 2.0]),), {}, "prompt"),
    "an array that is one number": ((np.array(3),), {}, "prompt"),
    "nothing": ((None,), {}, "prompt"),
    "not Unicode": (("ab\udcff",), {}, "'.udcff', its character 2, is not Unicode"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(model: Model, case: str) -> None:
    arguments, options, message = REFUSED[case]
    with pytest.raises(RequestError, match=message):
        generate(model, *arguments, **options)
    with pytest.raises(RequestError, match=message):
        next(stream_generate(model, *arguments, **options))


REFUSED_BATCHES: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "no prompts": (([],), {}, "no prompts"),
    "too few options": ((["a", "b"], [SamplingParams()]), {}, "2 prompts need"),
    "too many options": ((["a"], [SamplingParams()] * 2), {}, "1 prompts need"),
    "list and keywords": ((["a"], [SamplingParams()]), {"top_k": 3}, "keywords"),
    "one text": (("abc",), {}, "list of prompts"),
    "nothing": ((None,), {}, "list of prompts"),
    "one bad among good": ((["a", ""],), {}, "prompt.* is empty"),
}


@pytest.mark.parametrize("case", REFUSED_BATCHES)
def test_refused_batches(model: Model, case: str) -> None:
    arguments, options, message = REFUSED_BATCHES[case]
    with pytest.raises(RequestError, match=message):
        batch_generate(model, *arguments, **options)


def test_options_of_a_stream_are_checked_at_once(model: Model) -> None:
    with pytest.raises(RequestError, match="top_k"):
        stream_generate(model, "a", top_k=-7)
