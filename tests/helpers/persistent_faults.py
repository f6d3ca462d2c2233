"""A persistent kernel in which words are missing, and the GPU that a real one needs."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest

from pallas_kernels import target
from pallas_kernels.persistent import kernel, multiplying

FEW_SPINS = 20_000


def skip_unless_hopper() -> None:
    """Skips a test of the kernel on other GPUs."""
    if target().capability != (9, 0):
        pytest.skip("the persistent kernel is written for compute capability 9.0")


@contextlib.contextmanager
def forgetting(step: int | None) -> Iterator[None]:
    """Kernels traced meanwhile store no products of a step, of any if None, and wait for less than a second."""
    store = multiplying.store_words

    def store_others(place: Any, *rest: Any) -> None:
        if step is not None and place.step != step:
            store(place, *rest)

    spins = mock.patch.object(kernel, "SPINS", FEW_SPINS)
    with mock.patch.object(multiplying, "store_words", store_others), spins:
        yield
