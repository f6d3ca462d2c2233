"""A step is compiled once, elsewhere than where it is called, and its errors arrive there."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flashsvd_jax.background_compile import BackgroundStep, BackgroundSteps
from flashsvd_jax.compile_cache import compile_count, expect_no_compile
from flashsvd_jax.sampling import SamplingParams

SHAPE = jax.ShapeDtypeStruct((3,), jnp.float32)


class Executable:
    """As compiling gives."""

    def __call__(self, *arguments: object) -> object:
        return arguments

    def runtime_executable(self) -> object:
        return self


class Jitted:
    """As `jax.jit` gives, but it tells which threads lower and compile, and waits for a sign to compile."""

    def __init__(self, error: Exception | None = None):
        self.threads: list[threading.Thread] = []
        self.go, self.error = threading.Event(), error

    out_info = "shapes"

    def trace(self, *shapes: object) -> "Jitted":
        self.threads.append(threading.current_thread())
        return self

    def lower(self) -> "Jitted":
        self.threads.append(threading.current_thread())
        return self

    def compile(self) -> object:
        assert self.go.wait(60)
        self.threads.append(threading.current_thread())
        if self.error is not None:
            raise self.error
        return Executable()


def test_it_is_lowered_here_and_compiled_meanwhile() -> None:
    jitted = Jitted()
    step = BackgroundStep(jitted)
    assert step.begin(1) == "shapes"
    assert step.begin(2) == "shapes"  # and nothing is done, as one is on the way
    assert jitted.threads == [threading.main_thread()] * 2
    jitted.go.set()
    assert step(3, 4) == (3, 4) and step(5) == (5,)
    assert len(jitted.threads) == 3 and jitted.threads[2] != threading.main_thread()


def test_what_compiling_raises_the_call_raises() -> None:
    jitted = Jitted(ValueError("too large"))
    jitted.go.set()
    step = BackgroundStep(jitted)
    step.begin(1)
    for _ in range(2):
        with pytest.raises(ValueError, match="too large"):
            step(1)
    assert len(jitted.threads) == 3 * 2  # traced, lowered and compiled again, as memory may have been short
    jitted.error = None
    assert step(1) == (1,)


@pytest.mark.parametrize("begun", [True, False])
def test_a_jitted_function_is_compiled_once(begun: bool) -> None:
    values = [jnp.asarray(np.full(3, number, np.float32)) for number in (1, 2)]
    step, before = BackgroundStep(jax.jit(lambda x, y: (x + y, 2 * y), donate_argnums=0)), compile_count()
    if begun:
        step.begin(SHAPE, SHAPE)
    found = step(*values)
    np.testing.assert_array_equal(found, [[3] * 3, [4] * 3])
    assert compile_count() == before + 1 and values[0].is_deleted()
    with expect_no_compile():
        step(*found)


def test_threads_that_call_at_once_begin_it_once() -> None:
    traced: list[None] = []

    class Slow:
        def trace(self, *shapes: Any) -> Any:
            traced.append(None)
            time.sleep(0.1)
            return jax.jit(lambda x: x + 1).trace(*shapes)

    steps = BackgroundSteps(Slow())
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: steps["a kind"](jnp.ones(3)), range(6)))
    np.testing.assert_array_equal(found, np.full((6, 3), 2))
    assert len(traced) == 1


def test_all_that_a_call_needs_is_begun_before_anything_is_called(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of three chunks, and decoding: what begins a chunk serves three times, what goes on with one twice."""
    engine, done = tiny.new_engine(), []
    for name in ("begin", "__call__"):
        whole = getattr(BackgroundStep, name)
        told = lambda step, *of, name=name, whole=whole: done.append((name, id(step))) or whole(step, *of)  # noqa: E731
        monkeypatch.setattr(BackgroundStep, name, told)
    for _ in engine.generate([[1 + n % 50 for n in range(40)]], [SamplingParams(max_tokens=3)]):
        pass
    called = [step for name, step in done if name == "__call__"]
    begin, first, end, *_ = called
    assert called.count(begin) == 3 and called[3:6] == called[6:9] and len(called) == 10
    assert len(set(called)) == 6 and called.count(first) == called.count(end) == 1
    first = next(number for number, (name, _) in enumerate(done) if name == "__call__")
    assert {step for _, step in done[:first]} == set(called)
