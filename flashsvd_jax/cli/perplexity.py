"""Perplexity of a text file with its standard error.

The file is tokenized as a whole and cut into windows; the first token of each window is not scored.
"""

import argparse
from pathlib import Path

from flashsvd_jax.cli.options import add_model_options, load_model, read_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    add_model_options(parser)
    parser.add_argument("file", type=Path, help="a text in UTF-8")
    parser.add_argument("--window", type=int, metavar="N", help="tokens in a window; 2048 or the model's limit")
    parser.add_argument("--stride", type=int, metavar="N", help="from window to window; no overlap if not given")
    parser.add_argument("--batch", type=int, metavar="N", help="windows at once; by memory if not given")


def run(parsed: argparse.Namespace) -> None:
    """Runs the command."""
    text = read_text(parsed.file)

    from flashsvd_jax.scoring import perplexity

    model = load_model(parsed)
    result = perplexity(model, text, window=parsed.window, stride=parsed.stride, batch=parsed.batch)
    print(
        f"perplexity {result.value:.4f} ± {result.standard_error:.4f}"
        f" ({result.tokens} tokens scored in {result.windows} windows of {result.window})"
    )
