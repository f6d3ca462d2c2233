"""Ranks, sizes and memory of a model, from file headers alone."""

import argparse
from pathlib import Path

from flashsvd_jax.cli.options import add_materialize


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("model", help="folder that `flashsvd convert` wrote, or the hub id of one")
    parser.add_argument("--context", type=int, metavar="N", help="tokens to give sizes for; as `load` if not given")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="sequences at once, likewise")
    add_materialize(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also save a heat map of the ranks, e.g. ranks.png")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(parsed: argparse.Namespace) -> None:
    """Runs the command."""
    from flashsvd_jax.inspection import inspect

    found = inspect(parsed.model, context=parsed.context, batch=parsed.batch, materialize=parsed.materialize)
    if parsed.plot is not None:
        from flashsvd_jax.plotting import plot_ranks

        plot_ranks(found, parsed.plot)
    print(found.to_json() if parsed.json else found)
