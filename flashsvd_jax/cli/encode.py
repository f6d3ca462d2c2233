"""Turn each line of a text file into a vector, with an encoder."""

import argparse
import io
import json
import sys
from pathlib import Path
from typing import Any

from flashsvd_jax.cli.options import add_loading_options, check_folder_of
from flashsvd_jax.errors import RequestError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    add_loading_options(parser)
    add = parser.add_argument
    add("file", nargs="?", default="-", help="texts in UTF-8, one a line; - is standard input")
    add(
        "--output",
        "-o",
        type=Path,
        metavar="FILE",
        help="write [texts, embed] float32 here, as NumPy's .npy; else print JSON",
    )
    add("--pooling", choices=("mean", "cls"), default="mean", help="mean over the tokens, or the first one")
    add("--normalize", action="store_true", help="scale vectors to length 1")
    add("--max-length", type=int, metavar="N", help="tokens of the longest text; the model's limit if not given")
    add("--truncate", action="store_true", help="cut longer texts off; they are an error otherwise")
    add("--batch", type=int, metavar="N", help="texts at once; by memory if not given")
    add(
        "--block-tokens",
        type=int,
        metavar="N",
        help="of those, compute at most so many tokens together, which takes less memory; all if not given",
    )


def run(parsed: argparse.Namespace) -> None:
    """Runs the command."""
    texts = _lines(parsed.file)
    check_folder_of(parsed.output)

    from flashsvd_jax.encoder_model import load_encoder
    from flashsvd_jax.encoding import encode

    model = load_encoder(
        parsed.model, dtype=parsed.dtype, materialize=parsed.materialize, kernels=parsed.kernels,
        block_tokens=parsed.block_tokens,
    )  # fmt: skip
    vectors = encode(
        model, texts, pooling=parsed.pooling, normalize=parsed.normalize, max_length=parsed.max_length,
        truncate=parsed.truncate, batch=parsed.batch,
    )  # fmt: skip
    if parsed.output is None:
        for vector in vectors:
            print(json.dumps([float(str(number)) for number in vector]))  # the shortest text of a float32
    else:
        _save(parsed.output, vectors)


def _lines(file: str) -> list[str]:
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        text = data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{'standard input' if file == '-' else file} cannot be read as text: {error}") from error
    # Not splitlines: it breaks lines at characters that may stand within a text.
    lines = text.replace("\r\n", "\n").split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def _save(file: Path, vectors: Any) -> None:
    """Writes a file whole or not at all; where a link leads, and into what is there but no file, such as a device, as it is."""
    import numpy as np

    content = io.BytesIO()
    np.save(content, vectors)
    try:
        place = file.resolve()
        if place.exists() and not place.is_file():
            place.write_bytes(content.getbuffer())
            return
        partial = place.with_name(f".{place.name}.partial")
        try:
            partial.write_bytes(content.getbuffer())
            partial.replace(place)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise RequestError(f"{file} cannot be written: {error}") from error
