"""Measures decoding: flashsvd_jax with its kernels and as plain XLA, and PyTorch, in one run on one device.

Every model and implementation has a process of its own. Rows are appended to --out as they come, one JSON object a line; a
failure or a timeout is a row with an `error`. The floor of a row is the bytes a step must read over the read bandwidth of the
device, which is measured first. Weights are random: the time does not depend on their values.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jobs
from case_process import in_turn
from cases import ALL_PEERS, CASES, GROUPS, Case, processes, tiny
from jobs import HERE, Job, JobProcess

from flashsvd_jax.benchmark import provenance
from flashsvd_jax.errors import FlashSVDError, RequestError

OURS = {"flashsvd_jax-persistent": "persistent", "flashsvd_jax-products": "products", "flashsvd_jax-xla": "xla"}
PERSISTENT_BATCH = 8  # larger ones it leaves to the others


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", default=",".join(GROUPS), metavar="NAME,..", help=f"of: {', '.join(GROUPS)}")
    parser.add_argument("--model", choices=("published", "tiny"), default="published", help="tiny is for a CPU")
    parser.add_argument("--ours", default=",".join(OURS), metavar="IMPL,..", help="of our implementations, or none")
    parser.add_argument("--peers", default=",".join(ALL_PEERS), metavar="NAME,..", help="PyTorch's variants, or none")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="S", help="start no case after so long")
    parser.add_argument("--case-limit", type=float, default=150.0, metavar="S", help="a case that takes longer fails")
    parser.add_argument(
        "--no-autotune", action="store_true", help="decode with our kernels alone, started sooner: no times of prompts"
    )
    parser.add_argument(
        "--ahead",
        type=int,
        default=0,
        metavar="N",
        help="start so many processes before their turn; none runs while another is timed",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="bench/results/<device>/decode.jsonl if not given")
    return parser.parse_args(argv)


def chosen(names: str, model: str) -> list[Case]:
    """The cases of the named groups.

    Raises:
      RequestError: an unknown group.
    """
    wanted = names.split(",")
    unknown = [name for name in wanted if name not in GROUPS]
    if unknown:
        raise RequestError(f"no cases named {', '.join(unknown)}; known: {', '.join(GROUPS)}")
    cases = [case for case in CASES if case.group in wanted]
    return tiny(cases) if model == "tiny" else cases


def plan(
    cases: Sequence[Case], ours: Sequence[str], peers: Sequence[str], device: dict[str, Any], deadline: float
) -> list[Job]:
    """The jobs in order of importance: for each model all implementations, ours first."""
    found = []
    for group in processes(cases):
        for impl in ours:
            served = tuple(c for c in group if impl != "flashsvd_jax-persistent" or c.batch <= PERSISTENT_BATCH)
            found += [Job("ours.py", OURS[impl], impl, served, device["bandwidth"], deadline)] if served else []
        for variant in dict.fromkeys(variant for case in group for variant in case.peers if variant in peers):
            if device["backend"] == "cpu" and variant != "eager":
                continue
            theirs = tuple(case for case in group if variant in case.peers)
            found.append(Job("peers/run.py", variant, f"torch-{variant}", theirs, device["bandwidth"], deadline))
    return found


def environment(script: str = "ours.py", backend: str = "", autotune: bool = True) -> dict[str, str]:
    """Of a process: this checkout importable, our engine with nearly the whole GPU, and PyTorch with none of it taken by JAX."""
    paths = [str(HERE), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "FLASHSVD_COMMIT": provenance()["commit"]}
    if script == "ours.py" and backend != "cpu":
        flags = "" if autotune else "--xla_gpu_autotune_level=0 "
        found["XLA_FLAGS"] = flags + found.get("XLA_FLAGS", "")
        if found.get("JAX_PLATFORMS") == "cuda":
            found["JAX_PLATFORMS"] = "cuda,cpu"  # encoders' weights are drawn on the host
        return {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", **found}
    return found | {"JAX_PLATFORMS": "cpu"}


def probe() -> dict[str, Any]:
    """Device, backend and read bandwidth, from a process that ends again and leaves the device's memory free.

    Raises:
      RequestError: that process failed.
    """
    command = [sys.executable, str(HERE / "ours.py"), "probe"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    if result.returncode:
        raise RequestError(f"the device cannot be measured:\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def measured(
    todo: Sequence[Job], limit: float, backend: str, left_out: list[str], ahead: int = 0
) -> Iterator[dict[str, Any]]:
    """Rows of the jobs, of which so many start before their turn; fills ``left_out`` with the cases that the budget left no time
    for."""
    begin = time.time()

    def start(number: int, job: Job, turns: dict[str, str]) -> JobProcess | None:
        if time.time() > job.deadline:
            left_out.extend(f"{job.impl}, {case}" for case in job.cases)
            return None
        print(f"[{time.time() - begin:5.0f} s] {number}/{len(todo)} {job.impl}, {job.cases[0]}", flush=True)
        return JobProcess(job, environment(job.script, backend, job.autotune) | turns)

    for job, process in in_turn(todo, ahead, start):
        done = 0
        for done, row in enumerate(process.rows(limit), 1):  # noqa: B007 (also of use after the loop)
            yield row
        left_out += [f"{job.impl}, {case}" for case in job.cases[done:]]


def line(row: dict[str, Any]) -> str:
    """A row as a line of the table that is printed last."""
    kept = "dense" if row["ranks"] == "dense" else f"{row['ratio']:.2f} {row['ranks']}"
    what = f"{row['suite']:<10} {row['model']:<12} {kept:<12} {row['batch']:>3} {row['context']:>6}  {row['impl']:<18}"
    if "error" in row:
        return f"{what} {row['error'][:60]}"
    if row["suite"] == "end-to-end":
        return f"{what} {row['total_ms']:8.1f} ms in all"
    return f"{what} {row['ms_per_token']:8.3f} ms/token, {row['fraction_of_bandwidth']:4.0%} of the bandwidth"


def main() -> int:
    """Runs the benchmark."""
    parsed = arguments()
    deadline = time.time() + parsed.budget
    try:
        ours = [impl for impl in OURS if impl in parsed.ours.split(",")]
        peers = [name for name in ALL_PEERS if name in parsed.peers.split(",")]
        cases = chosen(parsed.cases, parsed.model)
        if parsed.no_autotune and (peers or "flashsvd_jax-xla" in ours or any(c.suite != "decode" for c in cases)):
            raise RequestError("--no-autotune is for decoding with our kernels: no peers, no plain XLA, no end-to-end")
        device = probe()
    except FlashSVDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    out: Path = parsed.out or jobs.results_folder(device["device"]) / "decode.jsonl"
    print(f"{device['device']}, reads {device['bandwidth'] / 1e12:.3f} TB/s; rows go to {out}", flush=True)
    rows, left_out = [], []
    todo = plan(cases, ours, peers, device, deadline)
    if parsed.no_autotune:
        todo = [dataclasses.replace(job, autotune=False) for job in todo]
    for row in measured(todo, parsed.case_limit, device["backend"], left_out, parsed.ahead):
        row = {"device": device["device"], **row} | ({"cold_start_s": None} if parsed.ahead else {})
        rows.append(row)
        jobs.append_row(out, row)
    print(*map(line, rows), sep="\n")
    if left_out:
        print(f"Left out, {parsed.budget:.0f} s were spent, most important first:", *left_out, sep="\n  ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
