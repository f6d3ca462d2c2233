"""Measures prompts of decoders: flashsvd_jax beside plain JAX and PyTorch, dense and factorized, a process a case.

Appends a row a case to bench/results/<device>/prefill.jsonl, and prints a table last. A case that fails is a row with an `error`.
Weights are random: the time does not depend on their values.
"""

import sys
from collections.abc import Sequence

from prefill_cases import CASES, IMPLS, PrefillCase
from prompt_cases import arguments, chosen_sizes, measure_all

MODELS = ("llama-2-7b", "llama-3.1-8b")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark, all implementations of a case together."""
    parsed = arguments(__doc__, IMPLS, MODELS, argv)
    sizes, impls = chosen_sizes(parsed, CASES), parsed.impls.split(",")
    measure_all([PrefillCase(impl, *size) for size in sizes for impl in impls], parsed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
