"""Executables kept across processes: where, when, and that a second process finds them."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from flashsvd_jax.compile_cache import ENVIRONMENT_VARIABLE, cache_directory, enable_persistent_cache

OPTIONS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)

COUNT_HITS = """
import collections, json, jax
events = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event.removeprefix("/jax/compilation_cache/")]))
"""
GENERATE = """
import numpy as np
jax.config.update("jax_disable_most_optimizations", True)
jax.numpy.ones(3) + 1  # compiled before the cache is chosen
from flashsvd_jax.config import ModelConfig, RopeConfig
from flashsvd_jax.generation import batch_generate
from flashsvd_jax.model import Model
from flashsvd_jax.schema import nest, schema

config = ModelConfig("llama", 32, 16, 16, 1, 2, 2, 8, 64, 1e-6, RopeConfig(), (None,))
rng = np.random.default_rng(0)
params = nest({name: rng.normal(size=spec.shape).astype(np.float32) for name, spec in schema(config).items()})
model = Model.from_params(config, params)
events.clear()
completion = batch_generate(model, [[1, 2, 3]], seed=1, max_tokens=12)[0]
print(json.dumps({
    "tokens": completion.token_ids, "compiled": completion.statistics.compiled,
    "hits": completion.statistics.read, "misses": events["cache_misses"], "directory": jax.config.jax_compilation_cache_dir,
    "traced": events["compile_requests_use_cache"],
    "used": {op: sorted(names) for op, names in model.engine(1).kernels_used.items()},
}))
"""
ENABLE = """
from flashsvd_jax.compile_cache import enable_persistent_cache
enable_persistent_cache()
enable_persistent_cache()
jax.jit(lambda x: x * 3 + 1)(jax.numpy.ones(5))
print(json.dumps({"directory": jax.config.jax_compilation_cache_dir}))
"""


def run(script: str, home: Path, **environment: str) -> dict[str, Any]:
    """What a process of its own prints; only ``environment`` says where executables go."""
    ours = ("JAX_COMPILATION", "JAX_PERSISTENT", "FLASHSVD", "XDG")
    others = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    command = [sys.executable, "-c", COUNT_HITS + script]
    done = subprocess.run(command, env={**others, "HOME": str(home), **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def files(folder: Path) -> set[str]:
    """Names of the executables in a folder; beside each, JAX notes when it was last used."""
    return {path.name for path in folder.rglob("*") if path.is_file() and not path.name.endswith("-atime")}


def test_a_second_process_traces_and_compiles_nothing_anew(tmp_path: Path) -> None:
    cache = tmp_path / "made" / "when needed"
    first = run(GENERATE, tmp_path, **{ENVIRONMENT_VARIABLE: str(cache)})
    assert first["directory"] == str(cache)
    assert (first["compiled"], first["hits"], first["misses"]) == (4, 0, 4)
    made = files(cache)
    assert len(made) >= 4
    second = run(GENERATE, tmp_path, **{ENVIRONMENT_VARIABLE: str(cache)})
    assert (second["compiled"], second["hits"], second["misses"]) == (4, 4, 0)
    assert (first["traced"], second["traced"]) == (4, 0)
    assert second["tokens"] == first["tokens"] and second["used"] == first["used"] != {}
    assert files(cache) == made


def test_off_keeps_nothing(tmp_path: Path) -> None:
    assert run(ENABLE, tmp_path, **{ENVIRONMENT_VARIABLE: "off"})["directory"] is None
    assert files(tmp_path) == set()


def test_the_users_own_setting_of_jax_wins(tmp_path: Path) -> None:
    own, other = tmp_path / "own", tmp_path / "other"
    environment = {ENVIRONMENT_VARIABLE: str(other), "JAX_COMPILATION_CACHE_DIR": str(own)}
    got = run(ENABLE, tmp_path, **environment, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
    assert got["directory"] == str(own)
    assert files(own) and not other.exists()


@pytest.fixture
def unset(kept_executables: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """JAX without a cache folder, in the home of a user who set nothing."""
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    jax.config.update("jax_compilation_cache_dir", None)
    for name in (ENVIRONMENT_VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_where_executables_go(unset: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    below = Path("flashsvd_jax") / "executables"
    assert cache_directory() == tmp_path / ".cache" / below
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert cache_directory() == tmp_path / "caches" / below
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "")
    assert cache_directory() == tmp_path / "caches" / below
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(tmp_path / "chosen"))
    assert cache_directory() == tmp_path / "chosen"
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "of jax"))
    assert cache_directory() == tmp_path / "of jax"
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "off")
    assert cache_directory() is None


def test_enabling_keeps_every_executable(unset: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(tmp_path / "chosen"))
    assert enable_persistent_cache() == tmp_path / "chosen"
    assert [getattr(jax.config, name) for name in OPTIONS] == [str(tmp_path / "chosen"), 0.0, -1]
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "off")
    assert enable_persistent_cache() == tmp_path / "chosen"  # once chosen, it stays


def test_off_changes_no_setting(unset: None, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [getattr(jax.config, name) for name in OPTIONS]
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "off")
    assert enable_persistent_cache() is None
    assert [getattr(jax.config, name) for name in OPTIONS] == before
