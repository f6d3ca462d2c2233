"""Compress a dense decoder: every projection of its layers becomes two factors, chosen so that the model loses least."""

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from flashsvd_jax.cli.options import read_text
from flashsvd_jax.errors import RequestError

if TYPE_CHECKING:
    from flashsvd_jax.compress import Calibration

# Named here as well as in flashsvd_jax.compress, so that help does not wait for JAX; a test compares them.
METHODS = ("svd", "fwsvd", "asvd", "drone", "svdllm")
ALLOCATIONS = ("uniform", "greedy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    add = parser.add_argument
    add("model", help="a dense model: a Hugging Face folder or hub id, or a folder that `flashsvd convert` wrote")
    add("destination", help="folder to write; must not exist")
    add("--method", choices=METHODS, default="svdllm", help="what is minimised; README.md tells them apart")
    add("--ratio", type=float, required=True, metavar="R", help="share of the layers' parameters to keep, such as 0.6")
    add("--alloc", choices=ALLOCATIONS, default="uniform", help="the ratio everywhere, or ranks by gain a parameter")
    add("--rank-multiple", type=int, default=1, metavar="N", help="round ranks down to multiples of this, such as 8")
    add("--alpha", type=float, default=0.5, metavar="A", help="asvd: exponent of the inputs' mean magnitude")
    add(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="a text in UTF-8; Python code that comes with the package if not given",
    )
    add("--samples", type=int, default=128, metavar="N", help="windows of the text to take statistics of")
    add("--length", type=int, default=512, metavar="N", help="tokens of a window")
    add("--seed", type=int, default=0, metavar="N", help="chooses the windows, where the text has more")
    add("--dtype", choices=("bfloat16", "float16", "float32"), help="store in this; as the dense model if not given")
    add("--quiet", action="store_true", help="no progress bar and no table")


def run(parsed: argparse.Namespace) -> None:
    """Runs the command."""
    from flashsvd_jax.compress import METHODS, Recipe, compress
    from flashsvd_jax.inspection import inspect

    recipe = Recipe(parsed.method, parsed.ratio, parsed.alloc, parsed.rank_multiple, parsed.alpha)
    calibration = None if METHODS[parsed.method].needs is None else _calibration(parsed)
    with _dense_folder(parsed) as folder:
        compress(folder, parsed.destination, recipe, calibration, dtype=parsed.dtype, progress=not parsed.quiet)
    if not parsed.quiet:
        print(inspect(parsed.destination))


def _calibration(parsed: argparse.Namespace) -> "Calibration":
    from flashsvd_jax.bundled import CALIBRATION
    from flashsvd_jax.compress import Calibration

    file = parsed.calibration or CALIBRATION
    return Calibration(read_text(file), file.name, parsed.samples, parsed.length, parsed.seed)


@contextlib.contextmanager
def _dense_folder(parsed: argparse.Namespace) -> Iterator[Path]:
    """The model in this project's layout: as it is, or converted into a hidden folder beside the destination for the while."""
    from flashsvd_jax import _siblings
    from flashsvd_jax.checkpoint.layout import MANIFEST_FILE
    from flashsvd_jax.hub import CHECKPOINT_FILES, resolve_model

    path = resolve_model(parsed.model, CHECKPOINT_FILES)
    if (path / MANIFEST_FILE).is_file():
        yield path
        return
    destination = Path(parsed.destination).absolute()
    place = next(parent for parent in destination.parents if parent.is_dir())
    try:
        temporary = tempfile.TemporaryDirectory(prefix=f".{destination.name}.dense-", dir=place)
    except OSError as error:
        raise RequestError(f"{destination} cannot be written: {error}") from error
    with temporary as folder:
        dense = Path(folder, "dense")
        _siblings.load("converters").convert(path, dense, dtype=parsed.dtype, progress=not parsed.quiet)
        yield dense
