"""Measures encoders: flashsvd_jax beside plain JAX and PyTorch, dense and factorized, each case in a process of its own.

Appends a row a case to bench/results/<device>/encoder.jsonl, and prints a table last. A case that fails is a row with an `error`.
Weights are random: the time does not depend on their values. Of ours, "flashsvd_jax-blocksN" computes blocks of N tokens, and what
else stands behind the first hyphen is the implementation that is tried first, as in "flashsvd_jax-products-blocks4096".
"""

import argparse
import sys
from collections.abc import Sequence

from encoder_cases import CASES, IMPLS, EncoderCase
from prompt_cases import arguments, chosen_sizes, measure_all

MODELS = ("bert-base", "bert-large", "modernbert-base")


def chosen(parsed: argparse.Namespace) -> list[EncoderCase]:
    """The cases, all implementations of each together."""
    cases = (EncoderCase(impl, *size) for size in chosen_sizes(parsed, CASES) for impl in parsed.impls.split(","))
    return [case for case in cases if _has(case)]


def _has(case: EncoderCase) -> bool:
    """Whether the implementation does not do the same under another name: a batch that is a single block."""
    return (case.block_tokens or 0) < case.batch * case.length


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark."""
    parsed = arguments(__doc__, IMPLS, MODELS, argv)
    measure_all(chosen(parsed), parsed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
