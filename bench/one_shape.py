"""What scripts that time the kernels of one shape have in common: their options, and where their rows go."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from cases import Case
from jobs import config_of, results_folder

from flashsvd_jax.config import ModelConfig

RANKS = ("uniform", "mixed", "partly dense", "allocated", "allocated alike")


def options(description: str | None, ranks: Sequence[str] = ("uniform",)) -> argparse.ArgumentParser:
    """Of a shape, whose ranks may be spread in these ways, and of the file for rows."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default="llama-2-7b")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--ranks", choices=ranks, default="uniform", help="how they are spread")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--out", type=Path, help="bench/results/<device>/kernels.jsonl if not given")
    return parser


def shape_of(parsed: argparse.Namespace) -> ModelConfig:
    """The model that the options name."""
    return config_of(Case("", parsed.model, parsed.ratio, ranks=parsed.ranks))


def rows_file(out: Path | None) -> Path | None:
    """Where rows go; None, and a word on why, where there is no GPU."""
    if jax.default_backend() != "gpu":
        print("error: kernels are timed on a GPU", file=sys.stderr)
        return None
    return out or results_folder(jax.devices()[0].device_kind) / "kernels.jsonl"
