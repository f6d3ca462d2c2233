"""Steps kept in a folder of a test's own, and what stands for the end of the process that keeps them."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from flashsvd_jax import background_compile
from flashsvd_jax.compile_cache import ENVIRONMENT_VARIABLE


@contextlib.contextmanager
def kept_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Keeps executables in ``folder``, whatever the suite says; gives where whole steps are."""
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.delenv(ENVIRONMENT_VARIABLE)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    compilation_cache.reset_cache()
    yield folder / "steps"
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


def end_of_process() -> None:
    """Waits until all is written that is to be kept."""
    background_compile._threads().shutdown()
    background_compile._threads.cache_clear()
