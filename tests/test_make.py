"""What `make` chooses for a machine: the interpreter, and the build of JAX."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / ".ci"
FIND_PYTHON = str(SCRIPTS / "find_python.sh")


def _run(command: list[str], path: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command where programs are found in ``path`` alone."""
    return subprocess.run(command, env={**os.environ, "PATH": str(path)}, capture_output=True, text=True, check=False)


def _program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("gpus", "extra"),
    [
        ("580.65.06, 9.0", "cuda13"),
        ("610.1, 12.0", "cuda13"),
        ("575.51.03, 9.0", "cuda12"),
        ("580.65.06, 7.0", "cuda12"),
        ("580.65.06, 9.0\n580.65.06, 6.1", "cuda12"),
        ("525.60.13, 8.0", "cuda12"),
    ],
)
def test_jax_matches_the_driver_and_every_gpu(gpus: str, extra: str, tmp_path: Path) -> None:
    _program(tmp_path / "nvidia-smi", f"echo '{gpus}'")
    run = _run([sys.executable, str(SCRIPTS / "jax_extra.py")], tmp_path)
    assert (run.stdout, run.stderr) == (f"{extra}\n", "")


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 470.82.01, 8.0", "this machine has 470 and 8.0"),
        ("echo 580.65.06, 3.7", "this machine has 580 and 3.7"),
        ("echo 'NVIDIA-SMI has failed'; exit 9", "no usable GPU (NVIDIA-SMI has failed)"),
        ("echo 'No devices were found' >&2", "no usable GPU (No devices were found)"),
    ],
)
def test_unusable_gpu_means_cpu_and_says_why(script: str, reason: str, tmp_path: Path) -> None:
    _program(tmp_path / "nvidia-smi", script)
    run = _run([sys.executable, str(SCRIPTS / "jax_extra.py")], tmp_path)
    assert run.stdout == "cpu\n"
    assert reason in run.stderr


def test_no_driver_means_cpu(tmp_path: Path) -> None:
    run = _run([sys.executable, str(SCRIPTS / "jax_extra.py")], tmp_path)
    assert (run.stdout, run.stderr) == ("cpu\n", "")


def test_first_usable_python_is_found(tmp_path: Path) -> None:
    _program(tmp_path / "python3.12", "echo 'pyenv: python3.12: command not found' >&2; exit 127")
    _program(tmp_path / "python3.13", "exit 1")
    _program(tmp_path / "python3", f'exec {sys.executable} "$@"')
    assert Path(_run([FIND_PYTHON], tmp_path).stdout.strip()).samefile(sys.executable)


def test_no_python_is_explained(tmp_path: Path) -> None:
    _program(tmp_path / "python3", "exit 1")
    run = _run([FIND_PYTHON], tmp_path)
    assert (run.returncode, run.stdout) == (1, "")
    assert "No Python >= 3.12" in run.stderr


def test_named_python_is_taken_or_refused(tmp_path: Path) -> None:
    assert Path(_run([FIND_PYTHON, sys.executable], tmp_path).stdout.strip()).samefile(sys.executable)
    run = _run([FIND_PYTHON, "no-such-python"], tmp_path)
    assert (run.returncode, run.stdout) == (1, "")
    assert "PYTHON=no-such-python is not a Python >= 3.12" in run.stderr
