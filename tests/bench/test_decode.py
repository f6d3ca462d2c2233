"""The runner of the decode benchmark: what it plans, and that no failure of one process stops the others."""

import dataclasses
import importlib
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import decode
import jobs
import pytest
from cases import ALL_PEERS, CASES, GROUPS, Case, processes, tiny

from flashsvd_jax.errors import RequestError
from flashsvd_jax.shapes import kept_share, rank_layout

GPU = {"device": "GPU", "backend": "gpu", "bandwidth": 1e12}
KEYS = {
    "suite", "impl", "model", "ratio", "ranks", "batch", "context", "new_tokens", "ms_per_token", "tokens_per_s",
    "bytes_per_token", "floor_ms", "fraction_of_bandwidth", "read_tb_s", "peak_bytes", "total_ms", "commit", "date", "device",
}  # fmt: skip
WORKER = """
import json, sys, time
from jobs import Job, described, serve
job = Job.from_json(sys.argv[1])
def row(case):
    if case.context == 1: raise ValueError("out of memory\\nand more")
    if case.context == 2: time.sleep(60)
    if case.context == 3: sys.exit("the driver is gone")
    return described(job, case)
print("a library says hello")
for found in serve(job, row): print(json.dumps(found), flush=True)
"""

TURNS = """
import json, pathlib, sys, time
from case_process import gpu_alone, gpu_beside_others
from jobs import Job
impl = Job.from_json(sys.argv[1]).impl
folder = pathlib.Path(__file__).parent
with gpu_beside_others():
    (folder / impl).touch()
    while len(list(folder.glob("torch-*"))) < 4:  # all of them are here at a time
        time.sleep(0.05)
with gpu_alone():
    begin = time.time()
    time.sleep(0.2)
    print(json.dumps({"impl": impl, "timed": [begin, time.time()]}), flush=True)
"""


def run_worker(tmp_path: Path, contexts: list[int], limit: float = 30, deadline: float = 1e12) -> list[dict[str, Any]]:
    """Rows of a job whose cases succeed, raise (context 1), hang (2) or end the process (3)."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    cases = tuple(Case("core", "tiny", 0.5, context=context) for context in contexts)
    job = jobs.Job(str(script), "eager", "torch-eager", cases, 1e9, deadline)
    with jobs.JobProcess(job, decode.environment("peers/run.py")) as process:
        return list(process.rows(limit))


def test_a_case_that_fails_is_a_row_and_the_next_is_measured(tmp_path: Path) -> None:
    rows = run_worker(tmp_path, [16, 1, 17])
    assert [row["context"] for row in rows] == [16, 1, 17]
    assert [row.get("error") for row in rows] == [None, "ValueError: out of memory", None]


@pytest.mark.slow
def test_a_case_that_hangs_is_a_row_and_the_process_ends(tmp_path: Path) -> None:
    start = time.monotonic()
    rows = run_worker(tmp_path, [16, 2, 17], limit=15)
    assert time.monotonic() - start < 45
    assert [row["context"] for row in rows] == [16, 2, 17]
    assert "error" not in rows[0] and rows[1]["error"] == rows[2]["error"] == "no result after 15 s"


def test_a_process_that_dies_is_a_row_with_its_last_words(tmp_path: Path) -> None:
    rows = run_worker(tmp_path, [3])
    assert [row["error"] for row in rows] == ["exit status 1: the driver is gone"]
    assert rows[0].keys() >= {"suite", "impl", "model", "ratio", "ranks", "batch", "context", "commit", "date"}


def test_jobs_started_ahead_prepare_together_and_are_timed_alone(tmp_path: Path) -> None:
    script = tmp_path / "turns.py"
    script.write_text(TURNS)
    todo = [jobs.Job(str(script), "eager", f"torch-{n}", (Case("core", "tiny", 0.5),), 1e9, 1e12) for n in range(4)]
    rows = list(decode.measured(todo, 90, "gpu", [], ahead=3))
    assert [row["impl"] for row in rows] == [job.impl for job in todo]
    spans = sorted(row["timed"] for row in rows)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))


def test_what_the_budget_leaves_no_time_for_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    todo = decode.plan(CASES, ["flashsvd_jax-products"], [], GPU, deadline=time.time() - 1)
    left_out: list[str] = []
    assert list(decode.measured(todo, 1, "gpu", left_out)) == []
    assert len(left_out) == len(CASES) and left_out[0].startswith("flashsvd_jax-products, core: llama-2-7b 0.5")


def test_a_job_stops_at_its_deadline(tmp_path: Path) -> None:
    assert run_worker(tmp_path, [16, 17], deadline=time.time() - 1) == []


def test_the_plan_has_every_case_of_every_implementation_once() -> None:
    todo = decode.plan(CASES, list(decode.OURS), ALL_PEERS, GPU, 1e12)
    found = [(job.impl, case) for job in todo for case in job.cases]
    assert len(found) == len(set(found))
    for case in CASES:
        ours = set(decode.OURS) - ({"flashsvd_jax-persistent"} if case.batch > decode.PERSISTENT_BATCH else set())
        assert {impl for impl, c in found if c == case} == {*ours, *(f"torch-{peer}" for peer in case.peers)}
    assert all(len({case.weights for case in job.cases}) == 1 for job in todo)
    assert [job.impl for job in todo[:3]] == ["flashsvd_jax-persistent", "flashsvd_jax-products", "flashsvd_jax-xla"]


def test_without_autotuning_only_our_kernels_decode(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    assert "--xla_gpu_autotune_level=0" in decode.environment(backend="gpu", autotune=False)["XLA_FLAGS"]
    assert "autotune" not in decode.environment(backend="gpu")["XLA_FLAGS"]
    for options in (["--peers", "eager"], ["--ours", "flashsvd_jax-xla"], ["--cases", "end-to-end"]):
        rest = {"--cases": "core", "--ours": "flashsvd_jax-persistent", "--peers": "none"} | dict([tuple(options)])
        monkeypatch.setattr(
            sys, "argv", ["decode.py", "--no-autotune", *(word for pair in rest.items() for word in pair)]
        )
        assert decode.main() == 1
        assert "no peers, no plain XLA, no end-to-end" in capsys.readouterr().err


def test_a_cpu_runs_eager_alone_of_the_peers() -> None:
    todo = decode.plan(CASES, [], ALL_PEERS, {**GPU, "backend": "cpu"}, 1e12)
    assert {job.impl for job in todo} == {"torch-eager"}


def test_cases_are_chosen_by_group() -> None:
    assert {case.group for case in decode.chosen("batch,mixed", "published")} == {"batch", "mixed"}
    assert decode.chosen(",".join(GROUPS), "published") == list(CASES)
    assert {case.model for case in decode.chosen("context", "tiny")} == {"tiny"}
    with pytest.raises(RequestError, match="no cases named prefill; known: core"):
        decode.chosen("core,prefill", "published")


def test_the_cases_cover_what_the_readme_shows() -> None:
    at_512 = {case.ratio for case in CASES if (case.batch, case.context, case.model) == (1, 512, "llama-2-7b")}
    assert at_512 == {1.0, 0.8, 0.6, 0.5, 0.4}
    half = {(case.batch, case.context) for case in CASES if case.ratio == 0.5 and case.suite == "decode"}
    assert half == {(1, 512), (2, 512), (4, 512), (8, 512), (32, 512), (1, 4096), (8, 4096), (1, 16384), (8, 16384)}
    assert [len(group) for group in processes(CASES)] == [2, 1, 1, 1, 1, 1, 8, *[1] * 8]
    for case in tiny(CASES):
        config = jobs.config_of(case)
        assert rank_layout(config) == ("dense" if case.ratio == 1 else case.ranks)
        assert kept_share(config) == pytest.approx(case.ratio, abs=0.02)


@pytest.mark.slow
def test_the_script_measures_both_sides_on_this_machine(tmp_path: Path) -> None:
    out = tmp_path / "deeper" / "rows.jsonl"
    options = ["--model", "tiny", "--cases", "core,end-to-end", "--ours", "flashsvd_jax-xla", "--out", str(out)]
    # What is computed is of interest here, not how fast.
    env = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "FLASHSVD_COMMIT": "abc", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(Path(decode.__file__)), *options]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(row) for row in out.read_text().splitlines()]
    assert [(row["impl"], row["suite"], row.get("error")) for row in rows] == [
        (impl, suite, None) for impl in ("flashsvd_jax-xla", "torch-eager") for suite in ("decode", "end-to-end")
    ]
    for row in rows:
        assert row.keys() >= KEYS and row["commit"] == "abc"
        assert ("jax" in row and "kernels" in row) if row["impl"].startswith("flashsvd") else "torch" in row
        assert (row["floor_ms"] is None) == (row["suite"] == "end-to-end")
    assert rows[0]["ratio"] == rows[2]["ratio"] and rows[0]["read_tb_s"] == rows[2]["read_tb_s"] > 0
    assert all(row["impl"] in result.stdout.splitlines()[-1 - i] for i, row in enumerate(reversed(rows)))


def test_peak_memory_stands_in_the_first_row_of_a_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = importlib.import_module("ours")

    @dataclasses.dataclass(frozen=True)
    class Found:
        context: int
        kernels: str
        peak_bytes: int | None = 77

    def measure(*args: Any, context: int, kernels: str, **options: Any) -> list[Found]:
        return [Found(0, ""), Found(context, kernels)]

    monkeypatch.setattr(ours, "measure", measure)
    monkeypatch.setattr(ours, "random_weights", lambda config, dtype: None)
    monkeypatch.setattr(ours, "enable_persistent_cache", lambda: None)
    cases = tuple(Case("core", "tiny", 0.5, context=context) for context in (16, 32))
    rows = list(ours.rows(jobs.Job("ours.py", "xla", "flashsvd_jax-xla", cases, 1e9, 1e12)))
    assert [(row["context"], row["peak_bytes"]) for row in rows] == [(16, 77), (32, None)]
    assert {row["kernels"] for row in rows} == {"xla"}
