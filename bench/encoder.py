"""Measures encoders: flashsvd_jax beside plain JAX and PyTorch, dense and factorized, each case in a process of its own.

Appends a row a case to bench/results/<device>/encoder.jsonl, and prints a table last. A case that fails is a row with an `error`.
Weights are random: the time does not depend on their values.
"""

import argparse
import sys
from collections.abc import Sequence

from encoder_cases import CASES, EVERYWHERE, IMPLS, EncoderCase
from prompt_cases import arguments, chosen_sizes, measure_all

MODELS = ("bert-base", "bert-large", "modernbert-base")


def chosen(parsed: argparse.Namespace) -> list[EncoderCase]:
    """The cases, all implementations of each together."""
    return [
        EncoderCase(impl, *size)
        for size in chosen_sizes(parsed, CASES)
        for impl in parsed.impls.split(",")
        if impl.startswith(EVERYWHERE) or not size[0].startswith("modern")
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark."""
    parsed = arguments(__doc__, IMPLS, MODELS, argv)
    measure_all(chosen(parsed), parsed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
