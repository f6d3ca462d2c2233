"""What compiles, and when: one executable for each bucket of prompts and one to decode, of greedy calls and of all others."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flashsvd_jax.compile_cache import compile_count, expect_no_compile
from flashsvd_jax.engine import Engine
from flashsvd_jax.errors import RequestError
from flashsvd_jax.model import Model
from flashsvd_jax.sampling import SamplingParams

Complete = Callable[[Engine, Sequence[Sequence[int]], Sequence[SamplingParams]], list[list[int]]]

SHORT = SamplingParams(max_tokens=3, seed=0)
GREEDY = SamplingParams(temperature=0.0, max_tokens=3)
EVERYTHING = SamplingParams(
    temperature=0.7, top_k=9, top_p=0.8, min_p=0.01, repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=-0.4,
    seed=2**64 - 1, max_tokens=40, stop="never", stop_token_ids=[1, 2, 3], ignore_eos=True, logprobs=7,
)  # fmt: skip


def compiled_by(action: Callable[[], Any]) -> int:
    before = compile_count()
    action()
    return compile_count() - before


def prompt(length: int) -> list[int]:
    return [1 + n % 50 for n in range(length)]


def test_each_prompt_step_and_the_decode_step_compile_once(tiny: Any, complete: Complete) -> None:
    """Steps of a chunk of 16: of a first one, and of one that continues; both are of one length, whatever the prompt's."""
    engine = tiny.new_engine()
    run = lambda length, p=SHORT: compiled_by(lambda: complete(engine, [prompt(length)], [p]))  # noqa: E731
    assert run(5) == 4  # a chunk before, in and behind the layers, and decoding
    assert run(16) == 0
    assert run(17) == 2  # a further chunk in and behind the layers
    assert [run(length) for length in (1, 40, 95)] == [0, 0, 0]
    assert run(20, EVERYTHING) == 0


def test_greedy_calls_choose_and_decode_by_steps_of_their_own_and_compile_no_others(
    tiny: Any, complete: Complete
) -> None:
    engine = tiny.new_engine(batch=2)
    run = lambda *params: compiled_by(lambda: complete(engine, [prompt(5)] * len(params), params))  # noqa: E731
    assert run(GREEDY) == 4  # the prompt, and decoding
    assert run(GREEDY, dataclasses.replace(GREEDY, stop_token_ids=[3], ignore_eos=True, max_tokens=30)) == 0
    assert run(SHORT) == 2  # the same layers
    others = [dataclasses.replace(GREEDY, **change) for change in ({"logprobs": 0}, {"presence_penalty": 0.1})]
    assert [run(*params) for params in ([GREEDY, SHORT], others, [EVERYTHING], [GREEDY])] == [0, 0, 0, 0]


def test_longer_chunks_have_a_bucket_for_each_power_of_two(tiny: Any, complete: Complete) -> None:
    engine = tiny.new_engine(batch=4, prefill_chunk=32)
    lengths = [16, 3, 17, 32, 33, 48, 64, 50, 80, 95]
    new = [compiled_by(lambda length=length: complete(engine, [prompt(length)], [SHORT])) for length in lengths]
    buckets = [engine.chunks.lengths(length) for length in lengths]
    chunks = {(place > 0, bucket) for chunks in buckets for place, bucket in enumerate(chunks)}
    assert len(chunks) == 4
    begins, decode = len({bucket for _, bucket in chunks}), 1
    assert sum(new) == begins + 2 * len(chunks) + decode
    assert new == [4, 0, 3, 0, 2, 0, 2, 0, 0, 0]


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0.0}, {"temperature": 1.3}, {"top_k": 5}, {"top_p": 0.4}, {"min_p": 0.2}, {"repetition_penalty": 1.1},
        {"presence_penalty": 1.0}, {"frequency_penalty": 1.0}, {"seed": None}, {"seed": 2**63}, {"max_tokens": 1},
        {"max_tokens": None}, {"stop": ["a", "b"]}, {"stop_token_ids": range(16)}, {"ignore_eos": True}, {"logprobs": 20},
    ],
    ids=lambda change: "-".join(f"{k}={v}" for k, v in change.items()),
)  # fmt: skip
def test_no_option_compiles_anything(tiny: Any, complete: Complete, change: dict[str, Any]) -> None:
    engine = tiny.engine(batch=4)
    complete(engine, [prompt(20)], [SHORT])
    changed = dataclasses.replace(SHORT, **{k: tuple(v) if isinstance(v, range) else v for k, v in change.items()})
    with expect_no_compile():
        complete(engine, [prompt(3), prompt(90), prompt(17)], [SHORT, changed, EVERYTHING])


@pytest.mark.parametrize("greedy", [True, False, None])
def test_after_warming_up_nothing_is_compiled(tiny: Any, complete: Complete, greedy: bool | None) -> None:
    model = Model(tiny.config, tiny.weights, max_length=96, decode_chunk=8)
    engine = model.engine(2)
    engine.chunks = dataclasses.replace(engine.chunks, unit=32, longest=32)
    assert model.warm_up(2, greedy=greedy) == steps_of_16_and_32(greedy)
    calls = [GREEDY] * (greedy is not False) + [SHORT] * (greedy is not True)
    with expect_no_compile():
        assert model.warm_up(2, greedy=greedy) == 0
        for params, length in itertools.product(calls, (1, 16, 17, 33, 64, 70, 95)):
            complete(engine, [prompt(length), prompt(3)], [params] * 2)


def steps_of_16_and_32(greedy: bool | None) -> int:
    """Of chunks of 16 and 32 tokens, before, in and behind the layers, as a first one or not; the last two and decoding by kind."""
    return 2 + 4 + (4 + 1) * (2 if greedy is None else 1)


@pytest.mark.parametrize("longest", [0, 96])
def test_a_prompt_that_does_not_fit_is_not_prepared_for(tiny: Any, longest: int) -> None:
    with pytest.raises(RequestError, match=f"from 1 to 95 tokens, not {longest}"):
        tiny.engine().prepare(longest, greedy=True)


def test_what_was_given_up_compiles_nothing_later(tiny: Any, complete: Complete) -> None:
    engine = tiny.engine(batch=4)
    complete(engine, [prompt(20)], [SHORT])
    with expect_no_compile():
        blocks: Any = engine.generate([prompt(20)], [EVERYTHING])
        next(blocks)
        blocks.close()
        complete(engine, [prompt(20)], [SHORT])


def test_expect_no_compile_raises_where_something_is_compiled() -> None:
    def double(x: jax.Array) -> jax.Array:
        return x * 2

    values, jitted = jnp.asarray(np.arange(5.0, dtype=np.float32)), jax.jit(double)
    with pytest.raises(RuntimeError, match=r"^1 executables were compiled"), expect_no_compile():
        jitted(values)
    with expect_no_compile():
        jitted(values)
    assert compiled_by(lambda: jax.jit(lambda x: x * 3)(values)) == 1


def test_an_error_inside_expect_no_compile_is_not_hidden() -> None:
    values = jnp.asarray(np.arange(5.0, dtype=np.float32))
    with pytest.raises(KeyError), expect_no_compile():
        jax.jit(lambda x: x * 5)(values)
        raise KeyError
