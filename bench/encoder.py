"""Measures encoders: flashsvd_jax beside plain JAX and PyTorch, dense and factorized, each case in a process of its own.

Appends a row a case to bench/results/<device>/encoder.jsonl, and prints a table last. A case that fails is a row with an `error`.
Weights are random: the time does not depend on their values.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from encoder_cases import CASES, EVERYWHERE, IMPLS, EncoderCase
from prompt_cases import measure_all


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--impls", default=",".join(IMPLS), metavar="NAME,..", help=f"of: {', '.join(IMPLS)}")
    parser.add_argument(
        "--models", default="bert-base,bert-large,modernbert-base", metavar="NAME,..", help="or tiny, for a CPU"
    )
    parser.add_argument(
        "--ratios", metavar="R,..", help="of kept parameters, 1 is dense; those of all cases if not given"
    )
    parser.add_argument("--sizes", metavar="BxL,..", help="such as 64x512; those of all cases if not given")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="S", help="start no case after so long")
    parser.add_argument("--case-limit", type=float, default=120.0, metavar="S", help="a case that takes longer fails")
    parser.add_argument("--out", type=Path, metavar="FILE")
    return parser.parse_args(argv)


def chosen(parsed: argparse.Namespace) -> list[EncoderCase]:
    """The cases, all implementations of each together."""
    models, known = parsed.models.split(","), [*CASES, *(("tiny", ratio, 2, 32) for ratio in (0.5, 1.0))]
    ratios = None if parsed.ratios is None else [float(ratio) for ratio in parsed.ratios.split(",")]
    sizes = None if parsed.sizes is None else parsed.sizes.split(",")
    found = [case for case in known if case[0] in models and (ratios is None or case[1] in ratios)]
    found = [case for case in found if sizes is None or f"{case[2]}x{case[3]}" in sizes]
    impls = parsed.impls.split(",")
    return [
        EncoderCase(impl, *case)
        for case in found
        for impl in impls
        if impl in EVERYWHERE or not case[0].startswith("modern")
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark."""
    parsed = arguments(argv)
    measure_all(chosen(parsed), parsed.budget, parsed.case_limit, parsed.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
