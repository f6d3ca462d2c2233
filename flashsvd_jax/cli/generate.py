"""Complete a prompt, streaming the text to standard output and the times to standard error."""

import argparse
import sys
from typing import Any

from flashsvd_jax.cli.options import add_model_options, add_sampling_options, load_model, sampling_params


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    add_model_options(parser)
    parser.add_argument("--prompt", "-p", help="the text to complete; read from standard input if not given")
    add_sampling_options(parser, temperature=0.0)


def run(parsed: argparse.Namespace) -> None:
    """Runs the command."""
    prompt = sys.stdin.read() if parsed.prompt is None else parsed.prompt
    params = sampling_params(parsed)
    print_stream(load_model(parsed), prompt, params)


def print_stream(model: Any, prompt: Any, params: Any) -> Any:
    """Prints a completion as it comes, then its statistics; returns the last piece."""
    from flashsvd_jax.generation import stream_generate

    piece = None
    for piece in stream_generate(model, prompt, params):
        print(piece.text, end="", flush=True)
    print(flush=True)
    assert piece is not None
    print(describe(piece.statistics), file=sys.stderr)
    return piece


def describe(statistics: Any) -> str:
    """One line of times."""
    s = statistics
    start = f"compiled {s.compiled} executables" if s.compiled else "warm"
    return (
        f"{s.prompt_tokens} prompt + {s.generated_tokens} new tokens; first token {s.time_to_first_token * 1e3:.0f} ms"
        f" ({start}), then {s.tokens_per_second:.1f} tokens/s"
    )
