"""A step is compiled once, elsewhere than where it is called, and its errors arrive there."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flashsvd_jax.background_compile import BackgroundStep
from flashsvd_jax.compile_cache import compile_count, expect_no_compile

SHAPE = jax.ShapeDtypeStruct((3,), jnp.float32)


class Jitted:
    """As `jax.jit` gives, but it tells which threads lower and compile, and waits for a sign to compile."""

    def __init__(self, error: Exception | None = None):
        self.threads: list[threading.Thread] = []
        self.go, self._error = threading.Event(), error

    def lower(self, *shapes: object) -> "Jitted":
        self.threads.append(threading.current_thread())
        return self

    def compile(self) -> object:
        assert self.go.wait(60)
        self.threads.append(threading.current_thread())
        if self._error is not None:
            raise self._error
        return lambda *arguments: arguments


def test_it_is_lowered_here_and_compiled_meanwhile() -> None:
    jitted = Jitted()
    step = BackgroundStep(jitted)
    step.begin(1)
    step.begin(2)  # nothing, as one is on the way
    assert jitted.threads == [threading.main_thread()]
    jitted.go.set()
    assert step(3, 4) == (3, 4) and step(5) == (5,)
    assert len(jitted.threads) == 2 and jitted.threads[1] != threading.main_thread()


def test_what_compiling_raises_the_call_raises() -> None:
    jitted = Jitted(ValueError("too large"))
    jitted.go.set()
    step = BackgroundStep(jitted)
    step.begin(1)
    for _ in range(2):
        with pytest.raises(ValueError, match="too large"):
            step(1)


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
