"""Runs tests that need a GPU in several processes on one GPU: most of their time is compilation, which needs a core each.

`python tests/gpu/in_parallel.py -n 12 [-- arguments of pytest]`, from anywhere. A process that takes longer than --limit seconds is
ended. Prints what failed, and a line a process; the exit status is 0 if all passed. Of what is timed here nothing can be told.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
NO_TESTS = 5  # pytest's exit status for a process to which no test fell


def start(index: int, count: int, arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """One process with its share of the tests."""
    root = HERE.parents[1]
    paths = [str(root), str(root / "tests" / "helpers"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {
        **os.environ, "JAX_PLATFORMS": "cuda", "PYTHONPATH": os.pathsep.join(paths), "FLASHSVD_SHARD": f"{index}/{count}",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_FLAGS": "--xla_gpu_autotune_level=0 " + os.environ.get("XLA_FLAGS", ""),
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rfE", "-p", "no:cacheprovider", *arguments]
    with log.open("wb") as out:
        return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env, cwd=root)


def ended(process: subprocess.Popen[bytes], deadline: float) -> bool:
    """Whether a process passed, in time; ends it if not."""
    try:
        return process.wait(max(0.0, deadline - time.time())) in (0, NO_TESTS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return False


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
    passed = [ended(process, deadline) for process in processes]
    for log, good in zip(logs, passed, strict=True):
        lines = log.read_text(errors="replace").splitlines() or ["nothing printed"]
        if not good:
            print(*(line for line in lines if line.startswith(("FAILED", "ERROR", "E  "))), sep="\n")
        print(f"{log}: {'passed' if good else 'FAILED'}, {lines[-1]}")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
