"""Runs tests that need a GPU in several processes on one GPU: most of their time is compilation, which needs a core each.

`python tests/gpu/in_parallel.py -n 12 [-- arguments of pytest]`, from anywhere. A process that takes longer than --limit seconds is
ended, and has failed. Prints what failed, and a line a process; the exit status is 0 if all passed. Of what is timed here nothing
can be told.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
NO_TESTS = 5  # pytest's exit status for a process to which no test fell
GRACE_S = 15


def start(index: int, count: int, arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """One process with its share of the tests."""
    root = HERE.parents[1]
    paths = [str(root), str(root / "tests" / "helpers"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {
        **os.environ, "JAX_PLATFORMS": "cuda", "PYTHONPATH": os.pathsep.join(paths), "FLASHSVD_SHARD": f"{index}/{count}",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        # References are computed by numpy, whose library would else start a thread a core in every process.
        **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
        "XLA_FLAGS": "--xla_gpu_autotune_level=0 " + os.environ.get("XLA_FLAGS", ""),
    }  # fmt: skip
    options = ["-m", "gpu", "-q", "-rfE", "--durations=5", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, *arguments]
    with log.open("wb") as out:
        return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env, cwd=root)


def passed_in_time(processes: Sequence[subprocess.Popen[bytes]], deadline: float) -> list[bool]:
    """Of each whether it did; ends those that run longer."""
    late = [process for process in processes if still_runs(process, deadline)]
    for process in late:
        process.send_signal(signal.SIGINT)  # pytest then says what has failed so far
    for process in late:
        if still_runs(process, deadline + GRACE_S):
            process.kill()
            process.wait()
    return [process not in late and process.returncode in (0, NO_TESTS) for process in processes]


def still_runs(process: subprocess.Popen[bytes], at: float) -> bool:
    """Whether a process does at that time; waits for it until then."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(max(0.0, at - time.time()))
    return process.poll() is None


def main() -> int:
    """Runs them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="processes")
    parser.add_argument("--limit", type=float, default=600.0, metavar="S", help="seconds that all may take")
    parser.add_argument(
        "--logs", type=Path, default=Path("gpu-tests"), metavar="FOLDER", help="what each process printed"
    )
    parser.add_argument("arguments", nargs="*", help="of pytest, after --; tests/gpu if none")
    parsed = parser.parse_args()
    parsed.logs.mkdir(parents=True, exist_ok=True)
    logs = [parsed.logs / f"{index}.log" for index in range(parsed.n)]
    deadline, arguments = time.time() + parsed.limit, parsed.arguments or [str(HERE)]
    processes = [start(index, parsed.n, arguments, log) for index, log in enumerate(logs)]
    passed = passed_in_time(processes, deadline)
    for log, good in zip(logs, passed, strict=True):
        lines = log.read_text(errors="replace").splitlines() or ["nothing printed"]
        if not good:
            print(*(line for line in lines if line.startswith(("FAILED", "ERROR", "E  "))), sep="\n")
        print(f"{log}: {'passed' if good else 'FAILED'}, {lines[-1]}")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
