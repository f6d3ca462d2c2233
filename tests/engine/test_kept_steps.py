"""Steps that are kept whole: found by all that decides what they compute, and never in the way if a file is no good."""

import dataclasses
import gc
import hashlib
import logging
import pickle
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kept_executables import end_of_process, kept_in

from flashsvd_jax import config, kept_steps
from flashsvd_jax.background_compile import BackgroundStep
from flashsvd_jax.compile_cache import ENVIRONMENT_VARIABLE, cache_hits, compile_count, compiled_anew
from flashsvd_jax.shapes import mixed_config, shape_config
from pallas_kernels import Implementation, Norm, assume_target, record, rms_norm
from pallas_kernels.registry import Record
from pallas_kernels.target import H200

VALUES = jnp.arange(1.0, 4.0)
SHAPE = jax.ShapeDtypeStruct((3,), jnp.float32)
NORMED = np.arange(1.0, 4.0) / np.sqrt(14 / 3)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaled:
    """Arguments with something beside arrays."""

    x: Any
    by: int = dataclasses.field(metadata={"static": True})


@pytest.fixture(autouse=True)
def folder(kept_executables: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Where steps are kept, of a test alone."""
    with kept_in(tmp_path, monkeypatch) as found:
        yield found


@pytest.fixture
def counted() -> tuple[Callable[[jax.Array], jax.Array], list[None]]:
    """A norm, and a list that grows as it is traced."""
    traced: list[None] = []

    def norm(x: jax.Array) -> jax.Array:
        traced.append(None)
        return rms_norm(x, Norm(jnp.ones_like(x), 0.0))

    return norm, traced


def call(function: Callable[[jax.Array], jax.Array], used: Record | None = None) -> np.ndarray:
    """What a step gives as in a process of its own; what it keeps is written when this returns."""
    step = BackgroundStep(jax.jit(lambda x: function(x)), "norm", used)
    step.begin(SHAPE)
    found = np.asarray(step(VALUES))
    end_of_process()
    return found


def forget_what_jax_keeps(folder: Path) -> None:
    for file in folder.parent.glob("*-cache"):
        file.unlink()


def test_what_jax_had_kept_is_not_kept_again(counted: Any, folder: Path) -> None:
    """What is written of an executable that was read lacks its functions on a CPU, which only running it shows."""
    norm, traced = counted
    first = call(norm)
    (file,) = folder.iterdir()
    file.unlink()
    for _ in range(2):
        np.testing.assert_array_equal(call(norm), first)
    assert len(traced) == 3 and not list(folder.iterdir())


def test_what_another_has_read_is_not_kept_again(counted: Any, folder: Path) -> None:
    """JAX gives one executable to all that compile the same, and tells a hit only to who has read it."""
    norm, _ = counted
    call(norm)
    jitted = jax.jit(lambda x: norm(x))
    (read, first), (given, second) = (compiled_anew(jitted.lower(SHAPE)) for _ in range(2))
    assert read.runtime_executable() is given.runtime_executable()
    assert (first, second) == (False, False)


def test_a_kept_step_that_fails_when_it_is_called_is_forgotten(
    counted: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norm, _ = counted
    first = call(norm)

    def fails(*arguments: Any) -> Any:
        raise ValueError("a function is not there")

    with monkeypatch.context() as patch:
        patch.setattr(kept_steps.KeptStep, "load", lambda self: fails)
        with pytest.raises(ValueError, match="not there"):
            call(norm)
    assert not list(folder.iterdir())
    np.testing.assert_array_equal(call(norm), first)


def test_it_is_traced_once_and_says_again_which_kernels_it_uses(counted: Any, folder: Path) -> None:
    norm, traced = counted
    used, again = Record(), Record()
    with record(used):
        first = call(norm)
    before = compile_count(), cache_hits()
    np.testing.assert_allclose(first, NORMED, rtol=1e-6)
    np.testing.assert_array_equal(call(norm, again), first)
    assert len(traced) == 1 and len(list(folder.iterdir())) == 1
    assert again == used and used["rms_norm"].keys() == {"xla"}
    assert (compile_count(), cache_hits()) == (before[0] + 1, before[1] + 1)


def test_what_was_traced_before_is_kept_with_its_kernels(counted: Any) -> None:
    step, again = BackgroundStep(jax.jit(counted[0]), "norm"), Record()
    step.lower(SHAPE)
    step(VALUES)
    end_of_process()
    call(counted[0], again)
    assert again["rms_norm"].keys() == {"xla"} and len(counted[1]) == 1


def test_what_is_not_to_be_kept_is_not(counted: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "off")
    call(counted[0])
    monkeypatch.delenv(ENVIRONMENT_VARIABLE)
    jax.config.update("jax_compilation_cache_dir", "gs://bucket/executables")
    assert kept_steps.file_of("norm", [SHAPE]) is None
    jax.config.update("jax_compilation_cache_dir", None)
    assert kept_steps.file_of("norm", [SHAPE]) is None and not folder.exists()


def test_with_implementations_of_others_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rms_norm, "_implementations", [*rms_norm.implementations])
    rms_norm.register(Implementation("theirs", lambda x, norm: x))
    assert kept_steps.file_of("norm", [SHAPE]) is None


def test_all_that_decides_is_in_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def name(made_of: str = "norm", *of: Any) -> str:
        file = kept_steps.file_of(made_of, of or (Scaled(SHAPE, 2),))
        assert file is not None
        return file.name

    plain = name()
    assert plain == name() == name("norm", Scaled(VALUES, 2))  # an array has the name of its shape
    others = [
        name("other"),
        name("norm", Scaled(SHAPE, 3)),
        name("norm", SHAPE),
        name("norm", Scaled(jax.ShapeDtypeStruct((4,), jnp.float32), 2)),
        name("norm", Scaled(jax.ShapeDtypeStruct((3,), jnp.bfloat16), 2)),
        name("norm", Scaled(jax.ShapeDtypeStruct((3,), jnp.float32, weak_type=True), 2)),
    ]
    with jax.default_matmul_precision("tensorfloat32"):
        others.append(name())
    with jax.enable_x64(True):
        others.append(name())
    with assume_target(H200):
        others.append(name())
        monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", "/tmp")  # one kernel refuses then
        others.append(name())
    assert name() == plain
    monkeypatch.setenv("XLA_FLAGS", "--xla_some_flag")
    others.append(name())
    monkeypatch.delenv("XLA_FLAGS")
    for what in ("_code", "_instructions", "_libraries"):
        with monkeypatch.context() as changed:
            changed.setattr(kept_steps, what, lambda: "of another commit, or machine")
            others.append(name())
    assert len({plain, *others}) == len(others) + 1


def test_code_is_what_lies_on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = kept_steps._code()
    monkeypatch.setattr(kept_steps, "__file__", str(tmp_path / "kept_steps.py"))
    digests = [before]
    for text in ("{}", "{ }"):
        (tmp_path / "table.json").write_text(text)
        kept_steps._code.cache_clear()
        digests.append(kept_steps._code())
    kept_steps._code.cache_clear()
    monkeypatch.setattr(kept_steps, "__file__", str(tmp_path / "packed.zip" / "kept_steps.py"))
    assert kept_steps._code() is None and len(set(digests)) == 3
    kept_steps._code.cache_clear()


def cut(content: bytes) -> bytes:
    return content[:-9]


def other_bit(content: bytes) -> bytes:
    return content[:100] + bytes([content[100] ^ 1]) + content[101:]


def nothing(content: bytes) -> bytes:
    return b""


def no_executable(content: bytes) -> bytes:
    """Whole by its digest, but what it holds cannot be loaded."""
    kept = dataclasses.replace(pickle.loads(content[32:]), executable=b"nonsense")
    return (body := pickle.dumps(kept)) and hashlib.sha256(body).digest() + body


def no_step(content: bytes) -> bytes:
    return hashlib.sha256(b"nonsense").digest() + b"nonsense"


@pytest.mark.parametrize("spoil", [cut, other_bit, nothing, no_executable, no_step], ids=lambda spoil: spoil.__name__)
def test_a_file_that_is_no_good_is_made_again(
    counted: Any, folder: Path, caplog: pytest.LogCaptureFixture, spoil: Callable[[bytes], bytes]
) -> None:
    norm, traced = counted
    first = call(norm)
    (file,) = folder.iterdir()
    file.write_bytes(spoil(file.read_bytes()))
    forget_what_jax_keeps(folder)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(call(norm), first)
    assert len(traced) == 2 and str(file) in caplog.text
    caplog.clear()
    np.testing.assert_array_equal(call(norm), first)
    assert len(traced) == 2 and not caplog.text


def test_where_nothing_can_be_written_a_warning_says_so(
    counted: Any, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.write_text("a file in place of the folder")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            np.testing.assert_allclose(call(counted[0]), NORMED, rtol=1e-6)
            forget_what_jax_keeps(folder)
    assert caplog.text.count("are not kept in") == 1 and list(folder.parent.glob("**/.*.part")) == []


def test_a_disk_that_is_full_leaves_nothing_behind(
    counted: Any, folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept_steps.os, "replace", full)
    with caplog.at_level(logging.WARNING):
        call(counted[0])
    assert "No space left" in caplog.text and not list(folder.iterdir())


def test_what_is_donated_still_is() -> None:
    before = cache_hits()
    for _ in range(2):
        step, x = BackgroundStep(jax.jit(lambda x: 2 * x, donate_argnums=0), "twice"), VALUES + 0
        np.testing.assert_array_equal(step(x), 2 * VALUES)
        assert x.is_deleted()
        end_of_process()
    assert cache_hits() == before + 1


def test_what_a_step_was_given_is_let_go(counted: Any) -> None:
    call(counted[0])
    step, x = BackgroundStep(jax.jit(counted[0]), "norm"), VALUES + 0
    step(x)
    gone = weakref.ref(x)
    del x
    gc.collect()
    assert gone() is None


def test_what_cannot_be_serialized_leaves_nothing_behind(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        kept_steps.write(folder / "name", object(), SHAPE, {})
    assert "are not kept" in caplog.text and not folder.exists()


@pytest.mark.parametrize("shape", ["tiny", "gemma-3-12b", "phi-4", "opt-6.7b"])
def test_a_configuration_says_all_of_itself(shape: str) -> None:
    """It is a step's first argument, and known by its text alone."""
    for told in (shape_config(shape, 0.5), mixed_config(shape, 0.5)):
        assert eval(repr(told), vars(config)) == told
