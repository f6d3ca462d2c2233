"""`flashsvd compress`, and that statistics of a text pay on the bundled model."""

from pathlib import Path
from typing import Any

import pytest

from converters import convert
from flashsvd_jax import bundled
from flashsvd_jax.cli import compress as command
from flashsvd_jax.cli import main
from flashsvd_jax.compress import METHODS, Calibration, Recipe, compress
from flashsvd_jax.compress.allocation import ALLOCATIONS
from flashsvd_jax.inspection import inspect
from flashsvd_jax.model import load
from flashsvd_jax.scoring import perplexity

SMALL = ["--samples", "3", "--length", "32"]


def test_options_name_all_methods_and_allocations() -> None:
    assert tuple(METHODS) == command.METHODS
    assert (*command.ALLOCATIONS, "file") == ALLOCATIONS


@pytest.mark.parametrize("form", ["hugging_face", "folder"])
def test_a_dense_model_becomes_a_folder_and_a_table(
    form: str, dense: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "out"
    arguments = ["--ratio", "0.5", "--dtype", "float32", "--alloc", "greedy", "--rank-multiple", "2", *SMALL]
    assert main(["compress", str(getattr(dense, form)), str(out), "--method", "asvd", *arguments]) == 0
    found = inspect(out)
    assert capsys.readouterr().out == f"{found}\n"
    assert found.family == "asvd"
    assert "alpha 0.5 to 0.5 of the layers' parameters, greedy ranks in multiples of 2" in found.notes[0]
    assert "3 windows of 32 tokens of calibration.txt, seed 0" in found.notes[1]
    assert load(out).tokenizer is not None
    assert [path.name for path in tmp_path.rglob("*") if path.is_dir()] == ["new", "out"]


def test_a_text_of_ones_own(dense: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "mine.txt"
    text.write_text("some words, and some more of them\n" * 20, encoding="utf-8")
    arguments = [str(dense.folder), str(tmp_path / "out"), "--ratio", "0.5", "--calibration", str(text), "--quiet"]
    assert main(["compress", *arguments, *SMALL]) == 0
    assert capsys.readouterr().out == ""
    assert "of mine.txt, seed 0" in inspect(tmp_path / "out").notes[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ratio", "60"], "between 0 and 1, not 60.0"),
        (["--ratio", "0.5", "--calibration", "missing.txt"], "missing.txt cannot be read as text"),
        (["--ratio", "0.5", "--samples", "1000000", "--length", "32"], "calibration.txt has"),
        (["--ratio", "0.5", "--alpha", "0.4"], "--alpha is for --method asvd, not svdllm"),
        (["--ratio", "0.5", "--method", "svd", "--calibration", "any.txt"], "neither this --method nor --alloc does"),
    ],
)
def test_an_explained_error_is_one_line_and_leaves_nothing(
    arguments: list[str], message: str, dense: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compress", str(dense.hugging_face), str(tmp_path / "out"), *arguments, "--quiet"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("flashsvd compress: ") and message in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_a_factorized_checkpoint_is_named_as_it_was_given(
    resume: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(bundled.COMPRESSED), str(tmp_path / "out"), "--ratio", "0.5", *SMALL, *resume, "--quiet"]
    assert main(["compress", *arguments]) == 1
    assert f"{bundled.COMPRESSED} is factorized already" in capsys.readouterr().err


@pytest.mark.slow
def test_statistics_of_a_text_lower_the_heldout_perplexity(tmp_path: Path) -> None:
    convert(bundled.DENSE, tmp_path / "dense", progress=False)
    calibration = Calibration(bundled.CALIBRATION.read_text(encoding="utf-8"), "calibration.txt", 16, 256)
    heldout = bundled.HELDOUT.read_text(encoding="utf-8")[:3_000]
    found = {}
    for method in ("svd", "fwsvd", "asvd", "drone", "svdllm"):
        compress(tmp_path / "dense", tmp_path / method, Recipe(method, 0.6), calibration)
        model = load(tmp_path / method, dtype="float32", max_length=256)
        found[method] = perplexity(model, heldout, batch=1).value
    assert found["fwsvd"] < 0.98 * found["svd"]
    assert max(found["asvd"], found["drone"], found["svdllm"]) < 0.95 * found["svd"]
