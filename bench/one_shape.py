"""What scripts that time the kernels of one shape have in common: their options, and where their rows go."""

import argparse
import sys
from pathlib import Path

import jax
from jobs import results_folder


def options(description: str | None) -> argparse.ArgumentParser:
    """Of a shape, and of the file for rows."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default="llama-2-7b")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--out", type=Path, help="bench/results/<device>/kernels.jsonl if not given")
    return parser


def rows_file(out: Path | None) -> Path | None:
    """Where rows go; None, and a word on why, where there is no GPU."""
    if jax.default_backend() != "gpu":
        print("error: kernels are timed on a GPU", file=sys.stderr)
        return None
    return out or results_folder(jax.devices()[0].device_kind) / "kernels.jsonl"
