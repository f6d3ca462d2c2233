"""Compression goes on after it was killed, and what it makes then is what it would have made; other work is not mixed in."""

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from interruptions import content, interrupt_at

from flashsvd_jax import bundled
from flashsvd_jax.cli import main
from flashsvd_jax.compress import Calibration, Recipe, compress
from flashsvd_jax.errors import CheckpointError, RequestError

TEXT = bundled.CALIBRATION.read_text(encoding="utf-8")[:5000]
CALIBRATION = Calibration(TEXT, "text.txt", samples=4, length=48, seed=1)
RECIPES = [
    Recipe("svdllm", 0.5, "greedy"),
    Recipe("saes", 0.5, "effective"),
    Recipe("fwsvd", 0.5),
    Recipe("drone", 0.5, update=True),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.method)
def test_an_interrupted_run_goes_on(
    recipe: Recipe, dense: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compress(dense.folder, tmp_path / "whole", recipe, CALIBRATION)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 1)
        compress(dense.folder, tmp_path / "out", recipe, CALIBRATION, resume=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.resume", "whole"]
    assert (tmp_path / ".out.resume" / "layer_0.safetensors").is_file()
    with monkeypatch.context() as patch:
        interrupt_at(patch, 0)  # nothing is computed again
        patch.setattr("flashsvd_jax.compress.layerwise.choose_ranks", _interrupt)
        patch.setattr("flashsvd_jax.compress.dense_layers.fisher_statistics", _interrupt)
        compress(dense.folder, tmp_path / "out", recipe, CALIBRATION, resume=True)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


SCRIPT = """
    import sys
    from flashsvd_jax.compress import Calibration, Recipe, compress
    src, dst, text = sys.argv[1:]
    compress(src, dst, Recipe("svdllm", 0.5), Calibration(open(text).read(), "text.txt", 4, 48, 1), resume=True)
"""


def test_a_killed_run_leaves_no_model_and_the_next_goes_on(dense: Any, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(TEXT, encoding="utf-8")
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(dense.folder), str(out), str(text)]
    compiled_alike = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    with subprocess.Popen(command, env=os.environ | compiled_alike) as process:
        while not (tmp_path / ".out.resume" / "layer_0.safetensors").exists():
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    compress(dense.folder, out, Recipe("svdllm", 0.5), CALIBRATION, resume=True)
    compress(dense.folder, tmp_path / "whole", Recipe("svdllm", 0.5), CALIBRATION)
    assert content(out) == content(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text.txt", "whole"]


@pytest.fixture
def begun(dense: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run that has finished one layer of two."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 1)
        compress(dense.folder, tmp_path / "out", Recipe("svdllm", 0.5), CALIBRATION, resume=True)
    return tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": Recipe("svdllm", 0.6)}, "of other work .recipe was .*0.5.*now .*0.6"),
        ({"calibration": dataclasses.replace(CALIBRATION, seed=2)}, "text was .*seed 1.* now .*seed 2"),
        ({"dtype": "bfloat16"}, "dtype was 'float32', now 'bfloat16'"),
    ],
)
def test_other_work_is_refused_and_kept(change: dict[str, Any], message: str, dense: Any, begun: Path) -> None:
    options = {"recipe": Recipe("svdllm", 0.5), "calibration": CALIBRATION, "resume": True} | change
    kept = content(begun / ".out.resume")
    with pytest.raises(CheckpointError, match=message):
        compress(dense.folder, begun / "out", **options)
    assert content(begun / ".out.resume") == kept and not (begun / "out").exists()


def test_a_damaged_layer_is_named(dense: Any, begun: Path) -> None:
    file = begun / ".out.resume" / "layer_0.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"layer_0\.safetensors is damaged: .*delete it"):
        compress(dense.folder, begun / "out", Recipe("svdllm", 0.5), CALIBRATION, resume=True)
    file.unlink()
    compress(dense.folder, begun / "out", Recipe("svdllm", 0.5), CALIBRATION, resume=True)


def test_an_error_before_any_layer_leaves_nothing(dense: Any, tmp_path: Path) -> None:
    with pytest.raises(RequestError):
        compress(dense.folder, tmp_path / "out", Recipe("svd", 0.01, "greedy", 8), resume=True)
    assert not list(tmp_path.iterdir())


def test_the_conversion_of_a_model_is_kept_too(
    dense: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["compress", str(dense.hugging_face), str(tmp_path / "out"), "--ratio", "0.5", "--resume", "--quiet",
                 "--samples", "3", "--length", "32"]  # fmt: skip
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1)
        assert main(arguments) == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.dense", ".out.resume"]
    with monkeypatch.context() as patch:
        patch.setattr("converters.convert", _interrupt)
        assert main(arguments) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
