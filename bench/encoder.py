"""Measures encoders: flashsvd_jax beside PyTorch, dense and factorized, each case in a process of its own.

Appends a row a case to bench/results/<device>/encoder.jsonl, and prints a table last. A case that fails is a row with an `error`.
Weights are random: the time does not depend on their values.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from decode import environment
from encoder_cases import CASES, IMPLS, EncoderCase
from jobs import HERE, append_row, last_line, results_folder

from flashsvd_jax.benchmark import provenance


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--impls", default=",".join(IMPLS), metavar="NAME,..", help=f"of: {', '.join(IMPLS)}")
    parser.add_argument("--models", default="bert-base,bert-large", metavar="NAME,..", help="or tiny, for a CPU")
    parser.add_argument("--ratios", default="0.5,0.75,1", metavar="R,..", help="of kept parameters, 1 is dense")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="S", help="start no case after so long")
    parser.add_argument("--case-limit", type=float, default=120.0, metavar="S", help="a case that takes longer fails")
    parser.add_argument("--out", type=Path, metavar="FILE")
    return parser.parse_args(argv)


def chosen(parsed: argparse.Namespace) -> list[EncoderCase]:
    """The cases, all implementations of each together."""
    ratios, models = [float(ratio) for ratio in parsed.ratios.split(",")], parsed.models.split(",")
    sizes = [case for case in CASES if case[0] in models and case[1] in ratios]
    sizes += [("tiny", ratio, 2, 32) for ratio in ratios if "tiny" in models]
    return [EncoderCase(impl, *size) for size in sizes for impl in parsed.impls.split(",")]


def measured(case: EncoderCase, limit: float) -> dict[str, Any]:
    """The row of a case, from a process of its own."""
    script = "peers/encoder.py" if case.impl.startswith("torch") else "encoder_ours.py"
    command = [sys.executable, str(HERE / script), case.to_json()]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=limit, env=environment(script)
        )
    except subprocess.TimeoutExpired:
        return {**case.described(), "error": f"no result after {limit:.0f} s", **provenance()}
    rows = [line for line in result.stdout.splitlines() if line.startswith("{")]
    if result.returncode or not rows:
        return {**case.described(), "error": last_line(result.stderr)[:300], **provenance()}
    return json.loads(rows[-1]) | provenance()


def line(row: dict[str, Any]) -> str:
    """A row as a line of the table that is printed last."""
    what = f"{row['model']:<12} {row['ratio']:.2f} {row['batch']:>3} x {row['length']:<5} {row['impl']:<15}"
    if "error" in row:
        return f"{what} {row['error'][:70]}"
    memory = row["temp_bytes"] if row["peak_activation_bytes"] is None else row["peak_activation_bytes"]
    told = "" if memory is None else f"{memory / 2**20:9.0f} MiB"
    return f"{what} {row['latency_ms']:9.2f} ms {row['tflops']:7.1f} TFLOP/s {told}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark."""
    parsed = arguments(argv)
    start, rows = time.time(), []
    for case in chosen(parsed):
        if time.time() - start > parsed.budget:
            print(f"left out, {parsed.budget:.0f} s were spent: {case}")
            continue
        row = measured(case, parsed.case_limit)
        rows.append(row)
        append_row(parsed.out or results_folder(row.get("device", "failed")) / "encoder.jsonl", row)
    print(*map(line, rows), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
