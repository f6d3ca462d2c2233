"""Compiled executables kept across processes, and a count of those made in this one.

JAX's persistent cache also holds XLA's autotuning results on a GPU, as long as its folder is local. Options are set through
`jax.config`, never through XLA_FLAGS: an unknown flag there ends the process.
"""

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

ENVIRONMENT_VARIABLE = "FLASHSVD_CACHE_DIR"
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_HIT_EVENT = "/jax/compilation_cache/cache_hits"

_counts = {_COMPILE_EVENT: 0, _HIT_EVENT: 0}
_of_thread = threading.local()
_lock = threading.Lock()
_read: dict[int, Any] = {}
"""Executables that were read, by their ids, which no others get as long as they are here."""
_reading: set[int] = set()
"""Threads that have read one which is not there yet."""


def _count(event: str, *_: object, **__: object) -> None:
    if event in _counts:
        _counts[event] += 1
    if event == _HIT_EVENT:
        _of_thread.hits = _hits_of_thread() + 1
        if getattr(_of_thread, "tells", False):
            _reading.add(threading.get_ident())


def _hits_of_thread() -> int:
    return getattr(_of_thread, "hits", 0)


jax.monitoring.register_event_duration_secs_listener(_count)
jax.monitoring.register_event_listener(_count)


def compile_count() -> int:
    """Executables built in this process since this module was imported, those read from the persistent cache included."""
    return _counts[_COMPILE_EVENT]


def cache_hits() -> int:
    """How many of them were read from the persistent cache."""
    return _counts[_HIT_EVENT]


def compiled_anew(lowered: Any) -> tuple[Any, bool]:
    """A lowered function compiled, and whether that was not read from the persistent cache, by this thread or by another: JAX
    gives the same executable to all that compile the same."""
    before, _of_thread.tells = _hits_of_thread(), True
    try:
        compiled = lowered.compile()
        executable = compiled.runtime_executable()
        with _lock:
            if _hits_of_thread() != before:
                _read[id(executable)] = executable
            return compiled, id(executable) not in _read and _reading <= {threading.get_ident()}
    finally:
        _of_thread.tells = False
        _reading.discard(threading.get_ident())


def count_read() -> None:
    """Counts an executable that was read without JAX's doing, see `kept_steps`."""
    _counts[_COMPILE_EVENT] += 1
    _counts[_HIT_EVENT] += 1


@contextlib.contextmanager
def expect_no_compile() -> Iterator[None]:
    """Raises RuntimeError if anything is compiled inside the block: what a warmed-up engine must never do."""
    before = compile_count()
    yield
    if compile_count() != before:
        raise RuntimeError(f"{compile_count() - before} executables were compiled where none was expected")


def cache_directory() -> Path | None:
    """Where executables are kept: JAX's own setting, else FLASHSVD_CACHE_DIR ("off" for none), else the user's cache folder."""
    configured = jax.config.jax_compilation_cache_dir
    if configured:
        return Path(configured)
    chosen = os.environ.get(ENVIRONMENT_VARIABLE)
    if chosen == "off":
        return None
    if chosen:
        return Path(chosen)
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path.home() / ".cache") / "flashsvd_jax" / "executables"


def is_kept() -> bool:
    """Whether executables are kept by now, in a folder of this machine."""
    directory = jax.config.jax_compilation_cache_dir
    is_on = jax.config.jax_enable_compilation_cache and os.environ.get(ENVIRONMENT_VARIABLE) != "off"
    return bool(directory) and is_on and "://" not in directory


def enable_persistent_cache() -> Path | None:
    """Turns the persistent cache on; every executable is kept, however quickly it compiled. Returns its folder."""
    directory = cache_directory()
    if directory is None or jax.config.jax_compilation_cache_dir:
        return directory
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return directory
