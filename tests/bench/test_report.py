"""Tables and plots from rows: what they say, that they leave out what was not measured, and that staleness is found."""

import json
from pathlib import Path
from typing import Any

import pytest
import report
from reporting import plots, tables
from reporting.rows import Results, results


def row(impl: str = "flashsvd_jax", ratio: float = 0.4999, ms: float = 2.0, **fields: Any) -> dict[str, Any]:
    return {
        "suite": "decode", "impl": impl, "model": "llama-2-7b", "ratio": ratio, "dtype": "bfloat16", "batch": 1,
        "context": 512, "new_tokens": 64, "ms_per_token": ms, "floor_ms": 1.5, "fraction_of_bandwidth": 1.5 / ms,
        "bytes_per_token": int(1e9 * ratio), "kernels": "attend_cached=triton",
        "total_ms": 100 * ms, "prefill_ms": 11.0, "cold_start_s": 9.0,
    } | fields  # fmt: skip


def failure(impl: str, **fields: Any) -> dict[str, Any]:
    kept = ("suite", "impl", "model", "ratio", "dtype", "batch", "context", "new_tokens")
    return {key: value for key, value in row(impl, **fields).items() if key in kept} | {"error": "out of memory"}


def read(tmp_path: Path, *rows: dict[str, Any]) -> Results:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return results(file)


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_the_newest_row_counts_and_a_failure_does_not_hide_it(tmp_path: Path) -> None:
    found = read(tmp_path, row(ms=3.0), row(ms=2.0), failure("flashsvd_jax-products"), row(ms=9.0, dtype="float32"))
    assert cells(tables.decode(found))[2] == ["llama-2-7b", "0.50", "1", "512", "1.50", "2.00 (75%)"]


def test_of_others_the_fastest_row_counts_however_old(tmp_path: Path) -> None:
    slow, fast = row("torch-eager", 0.5, 46.0), row("torch-eager", 0.5, 28.0)
    for rows in ([slow, fast], [fast, slow], [failure("torch-eager"), slow, fast, failure("torch-eager")]):
        found = read(tmp_path, row(ms=2.0), *rows, row(ms=3.0))
        assert cells(tables.decode(found))[2][-2:] == ["3.00 (50%)", "28.00"]


def test_our_own_rows_are_named_by_what_ran(tmp_path: Path) -> None:
    persistent = row(ms=1.8, kernels="decode_layers=persistent, attend=xla")
    xla = row("flashsvd_jax", ms=3.0, kernels="decode_layers=xla")
    early = {key: value for key, value in row(ms=9.0).items() if key != "kernels"}
    found = read(tmp_path, early, row(), persistent, xla, failure("flashsvd_jax-persistent", batch=8))
    table = cells(tables.decode(found))
    assert table[0][-3:] == ["one launch", "separate kernels", "plain XLA"]
    assert [line[-3:] for line in table[2:]] == [["1.80 (83%)", "2.00 (75%)", "3.00 (50%)"], ["fails", "-", "-"]]
    assert cells(tables.speedups(found))[2:] == [["llama-2-7b", "0.50", "1", "512", "1.11", "1.67"]]


def test_implementations_stand_beside_each_other_and_failures_are_said(tmp_path: Path) -> None:
    found = read(tmp_path, row(), row("torch-eager", 0.4999, 20.0), failure("torch-eager", batch=8), row(batch=8))
    table = cells(tables.decode(found))
    assert table[0][-2:] == ["separate kernels", "PyTorch eager"]
    assert [line[-1] for line in table[2:]] == ["20.00", "fails"]
    assert cells(tables.speedups(found))[2:] == [["llama-2-7b", "0.50", "1", "512", "-", "10.00"]]


def test_ranks_by_time_are_set_beside_uniform_ones(tmp_path: Path) -> None:
    found = read(
        tmp_path, row(ms=2.2), row(ms=2.0, ratio=0.494, ranks="allocated"), row(ms=1.0, ratio=0.4, ranks="allocated")
    )
    lines = cells(tables.allocated_against_uniform(found))
    assert lines[0][-1] == "separate kernels"
    assert lines[2:] == [["llama-2-7b", "0.50, allocated", "1", "512", "2.00, uniform 2.20 (-9.1%)"]]
    assert tables.allocated_against_uniform(read(tmp_path, row())) == ""


def test_low_rank_is_set_beside_our_own_dense_model(tmp_path: Path) -> None:
    found = read(tmp_path, row(ratio=1.0, ms=4.0), row(ms=2.4), row(ratio=0.8, ms=3.6), row(ratio=0.6, batch=8))
    assert cells(tables.low_rank_against_dense(found))[2:] == [["0.80", "80%", "90%"], ["0.50", "50%", "60%"]]
    assert tables.low_rank_against_dense(read(tmp_path, row())) == ""


def test_whole_requests_have_a_table_of_their_own(tmp_path: Path) -> None:
    request = {"suite": "end-to-end", "new_tokens": 32, "floor_ms": None, "fraction_of_bandwidth": None}
    found = read(tmp_path, row(), row(ms=1.5, **request), row("torch-eager", ms=9.0, **request))
    assert cells(tables.end_to_end(found))[2] == ["llama-2-7b", "0.50", "1", "512 + 32", "150.0", "900.0"]
    assert len(cells(tables.decode(found))) == 3


def test_mixed_ranks_are_a_setting_of_their_own(tmp_path: Path) -> None:
    found = read(tmp_path, *(row(ms=2.2, ranks=ranks) for ranks in ("uniform", "mixed", "partly dense")))
    assert [line[1] for line in cells(tables.decode(found))[2:]] == ["0.50", "0.50, mixed", "0.50, partly dense"]
    assert plots.plots(found) == {}


def test_first_calls_are_of_the_newest_runs_that_timed_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, cached = {"compiled": 5, "cache_hits": 0}, {"compiled": 5, "cache_hits": 5}
    timed = [row(cold_start_s=17.0, commit="a", **compiled), row(cold_start_s=0.6, commit="a", **cached)]
    shared = [row(cold_start_s=None, commit="b", **counts) for counts in (compiled, cached)]
    read(tmp_path, *timed, *shared)
    monkeypatch.setattr(report, "DECODE", tmp_path / "rows.jsonl")
    table = report.start_table().partition("\n\n")[2]
    assert cells(table)[2][-2:] == ["17.0 s", "0.6 s"]


def test_nothing_measured_gives_nothing(tmp_path: Path) -> None:
    found = results(tmp_path / "absent.jsonl")
    for table in (tables.decode, tables.speedups, tables.low_rank_against_dense, tables.end_to_end):
        assert table(found) == ""
    assert plots.plots(found) == {} and tables.start(found, found) == ""


def test_plots_hold_points_floor_and_dense_level(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        row(ratio=1.0, ms=4.0, floor_ms=3.0),
        row(),
        row("torch-eager", 0.4999, 20.0),
        row(context=4096, ms=2.5),
    )
    data = plots.plots(found)
    assert set(data) == {"ratio", "context"}
    assert [(s["label"], s["x"], s["y"]) for s in data["ratio"]["panels"][0]["series"]] == [
        ("separate kernels", [0.5, 1.0], [2.0, 4.0]),
        ("PyTorch eager", [0.5], [20.0]),
        (plots.FLOOR, [0.5, 1.0], [1.5, 3.0]),
        (plots.DENSE, [0.5, 1.0], [4.0, 4.0]),
    ]
    (panel,) = data["context"]["panels"]  # nothing at batch 8
    assert (panel["series"][0]["x"], panel["series"][0]["y"]) == ([512, 4096], [2.0, 2.5])


def test_drawing_is_reproducible_and_carries_its_data(tmp_path: Path) -> None:
    wanted = plots.plots(read(tmp_path, row(ratio=1.0, ms=4.0), row()))
    assert plots.draw("ratio", wanted["ratio"]) == plots.draw("ratio", wanted["ratio"])
    folder = tmp_path / "plots"
    plots.write(folder, wanted)
    assert plots.stale(folder, wanted) == []
    assert b"<dc:date>" not in (folder / "ratio.svg").read_bytes()


def test_stale_plots_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = plots.plots(read(tmp_path, row(ratio=1.0, ms=4.0), row()))
    folder = tmp_path / "plots"
    assert plots.stale(folder, wanted) == ["ratio"]
    plots.write(folder, wanted)
    assert plots.stale(folder, {}) == ["ratio"]
    newer = plots.plots(read(tmp_path, row(ratio=1.0, ms=4.0), row(ms=1.9)))
    assert plots.stale(folder, newer) == ["ratio"]

    file = folder / "ratio.svg"
    file.write_text(file.read_text().replace("ms a token</text>", "seconds a token</text>"))
    assert plots.stale(folder, wanted) == ["ratio"]  # drawn by this version, so bytes count
    monkeypatch.setattr(plots.metadata, "version", lambda name: "0.0")
    assert plots.stale(folder, wanted) == []  # another version draws it otherwise: the data decides
    plots.write(folder, {})
    assert not file.exists()
