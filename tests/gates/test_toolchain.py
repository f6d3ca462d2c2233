"""Where the wheels are looked for, what is said where they are not, and what `make test` does to have them."""

import importlib.util
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import cuda_toolchain
import pytest
from cuda_toolchain import FOLDER_VARIABLE, REQUIRED_VARIABLE, Toolchain, find_toolchain, require_toolchain

SCRIPT = Path(__file__).parents[2] / ".ci" / "cuda_compiler.py"
JAXLIB = metadata.version("jaxlib")

own_plugin = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is not None, reason="this environment's own JAX compiles for CUDA"
)


def _wheels(folder: Path, version: str) -> Path:
    """A folder that looks as if pip had put the wheels there."""
    info = folder / f"jax_cuda13_plugin-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: jax-cuda13-plugin\nVersion: {version}\n")
    cuda = folder / "nvidia" / "cu13"
    (cuda / "bin").mkdir(parents=True)
    (cuda / "bin" / "ptxas").touch()
    (cuda / "nvvm" / "libdevice").mkdir(parents=True)
    return folder


def test_a_named_folder_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(_wheels(tmp_path, JAXLIB)))
    assert find_toolchain() == Toolchain((str(tmp_path),), tmp_path / "nvidia" / "cu13")


def test_the_environments_folder_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    folder = _wheels(tmp_path / "cuda-compiler", JAXLIB)
    assert find_toolchain() == Toolchain((str(folder),), folder / "nvidia" / "cu13")


def test_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(_wheels(tmp_path, "0.1.0")))
    assert find_toolchain() == f"jax-cuda13-plugin 0.1.0 in {tmp_path}, where jaxlib is {JAXLIB}"


@pytest.mark.parametrize("part", ["bin/ptxas", "nvvm/libdevice"])
def test_a_missing_part_is_named(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(_wheels(tmp_path, JAXLIB)))
    (tmp_path / "nvidia" / "cu13" / part).rename(tmp_path / "gone")
    assert Path(part).name in str(find_toolchain())


def test_without_wheels_tests_are_skipped_but_fail_in_ci(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.delenv(REQUIRED_VARIABLE, raising=False)
    with pytest.raises(pytest.skip.Exception, match="no jax-cuda13-plugin"):
        require_toolchain()
    monkeypatch.setenv(REQUIRED_VARIABLE, "1")
    with pytest.raises(pytest.fail.Exception, match="no jax-cuda13-plugin"):
        require_toolchain()


def test_no_folder_and_no_plugin_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(cuda_toolchain.importlib.util, "find_spec", lambda name: None)
    assert "`make test` makes it" in str(find_toolchain())


def test_ci_does_not_let_them_be_skipped() -> None:
    run = SCRIPT.with_name("run").read_text()
    assert f"export {REQUIRED_VARIABLE}=1\n" in run.split("make test")[0]


@own_plugin
def test_make_installs_what_the_tests_look_for(tmp_path: Path) -> None:
    """pip is replaced by a module that notes its arguments and makes the folder."""
    fake = tmp_path / "fake" / "pip.py"
    fake.parent.mkdir()
    fake.write_text("import os, sys\nprint(*sys.argv[1:])\nos.mkdir(sys.argv[sys.argv.index('--target') + 1])\n")
    run = _install(_wheels(tmp_path / "wheels", "0.1.0"), fake.parent)  # which an update of JAX left behind
    assert f"jax-cuda13-plugin=={JAXLIB} jax-cuda13-pjrt=={JAXLIB} nvidia-cuda-nvcc" in run.stdout
    assert "--no-deps" in run.stdout and not list((tmp_path / "wheels").iterdir())


def test_what_is_there_is_not_installed_again(tmp_path: Path) -> None:
    assert _install(_wheels(tmp_path / "wheels", JAXLIB), tmp_path).stdout == ""


@own_plugin
def test_a_failing_pip_leaves_the_folder_and_says_what_follows(tmp_path: Path) -> None:
    (tmp_path / "pip.py").write_text("raise SystemExit(3)\n")
    run = _install(_wheels(tmp_path / "wheels", "0.1.0"), tmp_path)
    assert run.returncode == 0 and "will be skipped" in run.stderr
    assert [path.name for path in tmp_path.iterdir() if path.is_dir() and path.name != "__pycache__"] == ["wheels"]
    assert (tmp_path / "wheels" / "jax_cuda13_plugin-0.1.0.dist-info").is_dir()


def _install(folder: Path, modules: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(modules)}
    command = [sys.executable, str(SCRIPT), str(folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
