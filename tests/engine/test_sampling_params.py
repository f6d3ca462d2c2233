"""What SamplingParams accepts, and what it says of a bad value."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from flashsvd_jax.errors import RequestError
from flashsvd_jax.sampling import SamplingParams
from flashsvd_jax.sampling.device import sampling_arrays
from flashsvd_jax.sampling.params import MAX_LOGPROBS, MAX_STOP_IDS, MAX_TEMPERATURE

WRONG = {
    "temperature": [-0.1, 1e39, math.inf, math.nan, "hot", None, [1.0]],
    "top_k": [-2, 1.5, "3", None, True],
    "top_p": [0, 0.0, -0.5, 1.001, math.nan, "x", None],
    "min_p": [-0.1, 1.1, math.nan, [0.1], None],
    "repetition_penalty": [0, -1.0, 1e-3, 1e3, math.inf, math.nan, "1", None],
    "presence_penalty": [-2.1, 2.1, math.nan, math.inf, "1", None],
    "frequency_penalty": [-2.1, 2.1, math.nan, -math.inf, "1", None],
    "seed": [-1, 2**64, 1.0, "1", False],
    "max_tokens": [0, -5, 2.0, "9", True],
    "stop": [5, None, "", ("a", ""), [b"a"], ["a", None]],
    "stop_token_ids": [5, None, "ab", [-1], [1.0], [True], [None]],
    "ignore_eos": ["no", None],
    "logprobs": [-1, MAX_LOGPROBS + 1, 1.0, True],
}
AT_THE_LIMIT: dict[str, list[Any]] = {
    "temperature": [0, 0.0, 1e-4, MAX_TEMPERATURE],
    "top_k": [-1, 0, 1, 10**6],
    "top_p": [1e-6, 1, 1.0],
    "min_p": [0, 0.0, 1, 1.0],
    "repetition_penalty": [0.01, 1, 100],
    "presence_penalty": [-2, 2],
    "frequency_penalty": [-2, 2],
    "seed": [None, 0, 2**64 - 1],
    "max_tokens": [None, 1, 10**6],
    "stop": ["a", (), [], ["a", "b"], ("a",) * 40],
    "stop_token_ids": [(), [], [0], (3, 4)],
    "ignore_eos": [True, False],
    "logprobs": [None, 0, MAX_LOGPROBS],
}


def test_numpys_numbers_are_pythons() -> None:
    """Whatever the type, it is one program that is compiled."""
    given = SamplingParams(
        temperature=np.float32(0.5), top_k=np.int32(3), seed=np.uint64(2**63), stop_token_ids=[np.int64(7)]
    )
    assert given == SamplingParams(temperature=0.5, top_k=3, seed=2**63, stop_token_ids=(7,))
    assert {type(given.temperature), type(given.top_k), type(given.seed), *map(type, given.stop_token_ids)} == {
        float,
        int,
    }


def cases(table: dict[str, list[Any]]) -> list[Any]:
    pairs = [(name, value) for name, values in table.items() for value in values]
    return [pytest.param(name, value, id=f"{name}-{str(value)[:12]}") for name, value in pairs]


@pytest.mark.parametrize(("name", "value"), cases(WRONG))
def test_a_bad_value_is_an_error_that_names_its_option_first(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"^{name} must be "):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(("name", "value"), cases(AT_THE_LIMIT))
def test_values_at_the_limits_are_taken(name: str, value: Any) -> None:
    SamplingParams(**{name: value})


def test_every_option_has_cases() -> None:
    assert {field.name for field in dataclasses.fields(SamplingParams)} == WRONG.keys() == AT_THE_LIMIT.keys()


def test_stop_is_one_text_or_several() -> None:
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(stop_token_ids=[3, 4]).stop_token_ids == (3, 4)
    assert hash(SamplingParams(stop=["a"])) == hash(SamplingParams(stop="a"))


def test_options_cannot_change_after_they_were_checked() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().top_p = 7.0  # type: ignore[misc]


def test_stop_tokens_and_end_tokens_share_the_places_on_the_device() -> None:
    def arrays(stop: list[int], ends: list[int], **options: Any) -> Any:
        return sampling_arrays([SamplingParams(stop_token_ids=stop, **options)], ends, 100, [0])

    most = list(range(MAX_STOP_IDS))
    assert sorted(arrays(most, []).stop_ids[0]) == most
    assert sorted(arrays(most, [0, 3]).stop_ids[0]) == most  # named twice, kept once
    assert set(arrays([7], [3]).stop_ids[0]) == {7, 3, -1}
    assert set(arrays([7], [3], ignore_eos=True).stop_ids[0]) == {7, -1}
    assert sorted(arrays(most, [50], ignore_eos=True).stop_ids[0]) == most
    with pytest.raises(RequestError, match=rf"stop_token_ids: at most {MAX_STOP_IDS} .*{MAX_STOP_IDS + 1}"):
        arrays(most, [50])
    with pytest.raises(RequestError, match=rf"stop_token_ids: at most {MAX_STOP_IDS} .*{MAX_STOP_IDS + 1}"):
        arrays([*most, 50], [])


def test_a_stop_token_outside_the_vocabulary_is_an_error() -> None:
    sampling_arrays([SamplingParams(stop_token_ids=[99])], (), 100, [0])
    with pytest.raises(RequestError, match="stop_token_ids: 100 is not a token; the vocabulary has 100"):
        sampling_arrays([SamplingParams(), SamplingParams(stop_token_ids=[100, 3])], (), 100, [0, 0])
