"""Steps kept in a folder of a test's own, and what stands for the end of the process that keeps them."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from flashsvd_jax import background_compile
from flashsvd_jax.compile_cache import ENVIRONMENT_VARIABLE


@contextlib.contextmanager
def kept_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Keeps executables in ``folder``, whatever the suite says; gives where whole steps are."""
    monkeypatch.delenv(ENVIRONMENT_VARIABLE)
    with jax_options(jax_compilation_cache_dir=str(folder)):
        yield folder / "steps"


@contextlib.contextmanager
def jax_options(**options: Any) -> Iterator[None]:
    """Options of JAX's cache, which reads them again."""
    before = {name: getattr(jax.config, name) for name in options}
    try:
        _set(options)
        yield
    finally:
        _set(before)


def _set(options: dict[str, Any]) -> None:
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def end_of_process() -> None:
    """Waits until all is written that is to be kept."""
    background_compile._threads().shutdown()
    background_compile._threads.cache_clear()
