"""`flashsvd evaluate`: its numbers are those of `perplexity` and lm-eval, its table sets models beside each other."""

import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import lm_eval.tasks
import numpy as np
import pytest

from flashsvd_jax.cli import main
from flashsvd_jax.compress import Recipe, compress
from flashsvd_jax.errors import RequestError
from flashsvd_jax.evaluation import Evaluation, evaluate, table
from flashsvd_jax.model import load
from flashsvd_jax.schema import count_params
from flashsvd_jax.scoring import Perplexity, perplexity

TEXT = "the quick brown fox jumps over the lazy dog\n" * 9


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


@pytest.fixture(scope="module")
def smaller(dense: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("smaller") / "smaller"
    compress(dense.folder, out, Recipe("svd", 0.5), progress=False)
    return out


@pytest.fixture
def few_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's own tasks are thousands of files, which take seconds to list."""
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(lm_eval.tasks.TaskManager, include_defaults=False))


def test_a_table_of_two_models_and_a_row_of_each(
    dense: Any, smaller: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, rows = tmp_path / "some.txt", tmp_path / "rows.jsonl"
    text.write_text(TEXT)
    arguments = ["--text", str(text), "--window", "16", "--batch", "4", "--append", str(rows), "--quiet"]
    assert main(["evaluate", str(dense.folder), str(smaller), *arguments]) == 0
    first, second = cells(capsys.readouterr().out)[2:]
    whole, low_rank = map(json.loads, rows.read_text().splitlines())
    expected = perplexity(load(dense.folder), TEXT, window=16, batch=4)
    assert whole["perplexity"] == pytest.approx(expected.value, rel=1e-6)
    assert whole["standard_error"] == pytest.approx(expected.standard_error, rel=1e-4)
    assert (whole["windows"], whole["window"], whole["text"]) == (expected.windows, 16, "some.txt")
    assert whole["params"] == count_params(dense.config)
    assert (whole["kept"], whole["family"], low_rank["family"]) == (1, "dense", "svd")
    assert 0.4 < low_rank["kept"] <= 0.5 and low_rank["weight_bytes"] < whole["weight_bytes"]
    assert low_rank["notes"][0].startswith("compressed by svd")
    assert first[0] == dense.folder.name and first[-1] == "1"
    assert first[-2] == f"{expected.value:.2f} ± {expected.standard_error:.2f}"
    ratio = low_rank["perplexity"] / whole["perplexity"]
    assert float(second[-1].split()[0]) == pytest.approx(ratio, abs=1e-3)


def test_the_error_of_a_ratio_is_that_of_the_differences() -> None:
    rng = np.random.default_rng(0)
    text = [rng.exponential(3, size) for size in (7, 7, 3)]  # a text varies more than models differ
    change = [rng.normal(0.1, 0.02, len(loss)) for loss in text]
    first, second = (
        Perplexity(math.nan, math.nan, 17, 3, 8, tuple(losses))
        for losses in (text, [t + c for t, c in zip(text, change, strict=True)])
    )
    value, error = second.over(first)
    every = np.concatenate(change)
    assert value == pytest.approx(math.exp(every.mean()))
    assert error == pytest.approx(value * every.std(ddof=1) / math.sqrt(len(every)))
    assert first.over(first) == (1, 0)


def test_perplexities_of_other_tokens_are_not_divided(dense: Any) -> None:
    one, other = (evaluate(dense.folder, text=TEXT, window=window, progress=False) for window in (16, 32))
    assert cells(table([one, other]))[3][-1] == "other tokens"
    assert one.perplexity is not None and other.perplexity is not None
    with pytest.raises(RequestError, match="different tokens or windows"):
        other.perplexity.over(one.perplexity)


@pytest.mark.usefixtures("few_tasks")
def test_lm_eval_tasks_are_columns(dense: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "questions.json"
    data.write_text("\n".join(json.dumps({"question": q, "label": i % 2}) for i, q in enumerate("abcdef")))
    task = {
        "task": "choose", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
        "doc_to_choice": ["x", "y"], "doc_to_target": "label", "metadata": {"version": 1},
    }  # fmt: skip
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "choose.yaml").write_text(json.dumps(task))  # JSON is YAML
    own = ["--task-folder", str(tmp_path / "tasks"), "--quiet", "--window", "32"]
    assert main(["evaluate", str(dense.folder), "--tasks", "choose", "--limit", "4", *own]) == 0
    head, _, line = cells(capsys.readouterr().out)
    assert head[-2:] == ["choose acc", "choose acc_norm"]
    accuracy, error = map(float, line[-2].split(" ± "))
    assert accuracy in (0, 0.25, 0.5, 0.75, 1)
    assert error == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / 3), abs=1e-3)


@pytest.mark.usefixtures("few_tasks")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "no_such_task"], "lm-eval has no task named no_such_task"),
        (["--text", "missing.txt"], "missing.txt cannot be read as text"),
        (["--window", "4096"], "window must be from 2 to 64"),
    ],
)
def test_an_explained_error_is_one_line(
    arguments: list[str], message: str, dense: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(dense.folder), *arguments, "--quiet"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1


def test_a_damaged_folder_is_named(dense: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(dense.folder, tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"nothing")
    assert main(["evaluate", str(tmp_path / "broken"), "--quiet"]) == 1
    assert "broken" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_told_before_another_is_scored(
    dense: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = tmp_path / "lines.jsonl"
    models = [str(dense.folder), str(tmp_path / "missing")]
    assert main(["evaluate", *models, "--append", str(lines), "--window", "16", "--quiet"]) == 1
    assert "missing" in capsys.readouterr().err and not lines.exists()


def test_rows_are_json_whatever_the_perplexity() -> None:
    endless = Perplexity(math.inf, math.inf, 10, 1, 16, ())
    row = Evaluation(
        model="m", family="svd", notes=(), kept=1.0, params=1, weight_bytes=2, dtype="float32", perplexity=endless
    )

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    found = json.loads(row.to_json(), parse_constant=refuse)
    assert (found["perplexity"], found["standard_error"], found["tokens"]) == (None, None, 10)
