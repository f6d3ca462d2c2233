"""The measurement of compressing a large model, on a tiny one: it is killed, goes on, and gives what it gives in one go."""

import json
from pathlib import Path
from typing import Any

import compress_large
import numpy as np
import pytest
from random_checkpoint import write_checkpoint
from reporting.compression_large import read, table
from safetensors.numpy import load_file

LAYERS = 10
"""Each takes a tenth of a second. On a busy machine the process may be looked at less often, and must not be done by then."""


def test_a_killed_compression_goes_on_to_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scratch, rows = tmp_path / "scratch", tmp_path / "rows.jsonl"
    arguments = ["--shape", "tiny", "--layers", str(LAYERS), "--samples", "2", "--length", "32", "--compare",
                 "--kill-after", "1", "--scratch", str(scratch), "--out", str(rows)]  # fmt: skip

    def call(*more: str) -> int:
        monkeypatch.setattr("sys.argv", ["compress_large.py", *arguments, *more])
        return compress_large.main()

    assert call("--budget", "0") == 1
    assert "goes on from" in capsys.readouterr().out and not rows.exists()
    with pytest.raises(SystemExit, match=r"is of .*'ratio': 0.6.*give another --scratch"):
        call("--ratio", "0.5")
    assert call() == 0
    row = json.loads(rows.read_text())
    assert [run["exit_code"] for run in row["runs"]] == [-9, 0] and row["killed"] == 1
    assert 1 <= len(row["runs"][0]["layer_s"]) < LAYERS
    assert row["identical"] is True and row["different_files"] == []
    assert (row["layers"], row["device"]) == (LAYERS, "cpu") and 0.5 < row["params"] / row["params_dense"] < 1
    assert 0 < row["peak_anonymous_gib"] < row["peak_rss_gib"] and 0 < row["convert_s"] < row["seconds"]
    assert not scratch.exists()
    assert f"tiny, {LAYERS} layers" in capsys.readouterr().out


def test_a_random_checkpoint_is_the_same_each_time_and_has_no_flat_spectrum(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_checkpoint(tmp_path / name, "tiny", layers=1)
    files = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes() for file in files)
    arrays = load_file(tmp_path / "one" / "model-00002-of-00002.safetensors")
    weight = arrays["model.layers.0.mlp.down_proj.weight"].astype(np.float32)
    values = np.linalg.svd(weight, compute_uv=False)
    assert weight.shape == (256, 704) and values[0] > 5 * values[-1]


def row(**fields: Any) -> dict[str, Any]:
    return {
        "device": "NVIDIA H200", "cores": 16, "model": "llama-2-7b", "layers": 32, "method": "drone", "ratio": 0.6,
        "alloc": "greedy", "samples": 128, "length": 512, "seconds": 600.0, "convert_s": 50.0, "layer_s": 14.2,
        "peak_rss_gib": 9.0, "peak_anonymous_gib": 6.0, "device_peak_gib": None, "killed": 1, "identical": True,
    } | fields  # fmt: skip


def test_the_newest_row_of_a_setting_is_a_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [row(seconds=1.0), row(), row(alloc="uniform", killed=0, identical=None)]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    lines = table(read([file])).splitlines()[2:]
    assert len(lines) == 2
    assert "`drone`, greedy ranks | 0.6 | 128 x 512 | 10.0 min | 50.0 s | 14.2 s" in lines[0]
    assert lines[0].endswith("| - | 1 x, files the same |") and lines[1].endswith("| not |")
    assert table([]) == ""
