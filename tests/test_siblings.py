import subprocess
import sys
from pathlib import Path

import pytest

from flashsvd_jax import _siblings

LOAD = "from flashsvd_jax import _siblings; _siblings.load('converters')"


@pytest.mark.parametrize("name", ["converters", "pallas_kernels"])
def test_own_package_is_loaded(name: str) -> None:
    assert _siblings.load(name).__name__ == name


@pytest.mark.parametrize("file", ["converters/__init__.py", "converters/notes.txt", "converters.py"])
def test_package_of_the_user_is_refused(file: str, tmp_path: Path) -> None:
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text("")
    run = subprocess.run([sys.executable, "-c", LOAD], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    *_, message = run.stderr.splitlines()
    assert "FlashSVDError: 'converters' is " in message
    assert str(path if path.suffix == ".py" else path.parent) in message
    assert "rename it, or run from another directory" in message
