"""Complete a prompt, streaming the text to standard output and the times to standard error."""

import argparse
import sys
import threading
from collections.abc import Iterator
from typing import Any

from flashsvd_jax.cli.options import add_model_options, add_sampling_options, load_model, sampling_params
from flashsvd_jax.errors import RequestError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    add_model_options(parser)
    parser.add_argument("--prompt", "-p", help="the text to complete; read from standard input if not given")
    add_sampling_options(parser, temperature=0.0)


def run(parsed: argparse.Namespace) -> None:
    """Runs the command."""
    prompt = _given() if parsed.prompt is None else parsed.prompt
    params = sampling_params(parsed)
    print_stream(load_model(parsed), prompt, params)


def _given() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise RequestError(f"standard input cannot be read as text: {error}") from error


def print_stream(model: Any, prompt: Any, params: Any) -> Any:
    """Prints a completion as it comes, then its statistics; returns the last piece."""
    from flashsvd_jax.generation import stream_generate

    piece = None
    for piece in announce_compilation(stream_generate(model, prompt, params)):
        print(piece.text, end="", flush=True)
    print(flush=True)
    assert piece is not None
    print(describe(piece.statistics), file=sys.stderr)
    return piece


def announce_compilation(pieces: Iterator[Any]) -> Iterator[Any]:
    """Passes pieces on; says what is going on if the first is not there after two seconds."""
    timer = threading.Timer(2.0, _announce)
    timer.daemon = True
    timer.start()
    try:
        for piece in pieces:
            timer.cancel()
            yield piece
    finally:
        timer.cancel()


def _announce() -> None:
    from flashsvd_jax.compile_cache import is_kept

    later = "; the next call finds it done" if is_kept() else ""
    print(f"compiling for this model and prompt length{later}", file=sys.stderr, flush=True)


def describe(statistics: Any) -> str:
    """One line of times."""
    s = statistics
    if s.compiled:
        start = f"read {s.read} executables" if s.read == s.compiled else f"compiled {s.compiled - s.read} executables"
    else:
        start = "warm"
    return (
        f"{s.prompt_tokens} prompt + {s.generated_tokens} new tokens; first token {s.time_to_first_token * 1e3:.0f} ms"
        f" ({start}), then {s.tokens_per_second:.1f} tokens/s"
    )
