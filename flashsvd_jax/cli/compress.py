"""Compress a dense decoder or encoder: projections of its layers become two factors each, chosen so that the model loses least."""

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from flashsvd_jax.cli.options import read_text
from flashsvd_jax.errors import FlashSVDError, RequestError

if TYPE_CHECKING:
    from flashsvd_jax.compress import Calibration, Recipe

# Named here as well as in flashsvd_jax.compress, so that help does not wait for JAX; a test compares them.
METHODS = ("svd", "fwsvd", "asvd", "drone", "svdllm", "saes", "aa_svd", "basis_sharing")
HEADS = ("own", "whole")
# and "file", which --ranks stands for
ALLOCATIONS = ("uniform", "greedy", "fisher", "v2", "effective", "importance", "sensitivity", "learned")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    add = parser.add_argument
    add("model", help="a dense model: a Hugging Face folder or hub id, or a folder that `flashsvd convert` wrote")
    add("destination", help="folder to write; must not exist")
    add("--method", choices=METHODS, default="svdllm", help="what is minimised; README.md tells them apart")
    target = parser.add_mutually_exclusive_group(required=True)
    size = target.add_argument
    size("--ratio", type=float, metavar="R", help="share of the layers' parameters to keep, such as 0.6")
    size("--params", type=int, metavar="N", help="or: parameters of the whole model")
    size("--bytes-per-token", type=int, metavar="N", help="or: bytes of weights that decoding a token reads")
    size("--ms-per-token", type=float, metavar="X", help="or: time of a token by --costs, batch 1, context 512")
    size(
        "--ranks", type=Path, metavar="FILE", help="or: a rank of each projection, as JSON, or another model's manifest"
    )
    add("--alloc", choices=ALLOCATIONS, default="uniform", help="how ranks are chosen; README.md tells them apart")
    add("--alike", action="store_true", help="greedy, fisher: one rank for each kind of projection, in all layers")
    add(
        "--costs",
        metavar="NAME",
        help="with --ms-per-token: a device and kernels of --costs-file; nvidia_h200/persistent",
    )
    add("--costs-file", type=Path, metavar="FILE", help="a table by bench/decode_costs.py in place of the package's")
    add(
        "--heads",
        choices=HEADS,
        help="encoders: factors of single heads of queries, keys and values (the default), or of whole projections",
    )
    add("--update", action="store_true", help="fit second factors again, to inputs as compressed layers give them")
    add("--rank-multiple", type=int, default=1, metavar="N", help="round ranks down to multiples of this, such as 8")
    add(
        "--layers-per-basis", type=int, metavar="N", help="basis_sharing: how many neighbouring layers share a basis; 2"
    )
    add("--alpha", type=float, metavar="A", help="asvd: exponent of the inputs' mean magnitude; 0.5")
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
    add("--resume", action="store_true", help="keep finished layers, and go on from those of an interrupted call")
    add("--quiet", action="store_true", help="no progress bar and no table")


def run(parsed: argparse.Namespace) -> None:
    """Runs the command."""
    from flashsvd_jax.compress import compress
    from flashsvd_jax.inspection import inspect

    recipe = _recipe(parsed)
    if parsed.calibration is not None and not recipe.reads_text:
        raise RequestError("--calibration is for what reads a text, which neither this --method nor --alloc does")
    calibration = _calibration(parsed) if recipe.reads_text else None
    options = {"dtype": parsed.dtype, "resume": parsed.resume, "progress": not parsed.quiet}
    with _dense_folder(parsed) as folder:
        compress(folder, parsed.destination, recipe, calibration, **options)
    if not parsed.quiet:
        print(inspect(parsed.destination))


def _recipe(parsed: argparse.Namespace) -> "Recipe":
    from flashsvd_jax.compress import Recipe, Target
    from flashsvd_jax.compress.allocation import read_ranks
    from flashsvd_jax.compress.budget import Unit
    from flashsvd_jax.compress.decode_costs import COSTS_FILE, DEFAULT_COSTS, load_costs

    options = {"multiple": parsed.rank_multiple, "update": parsed.update, "heads": parsed.heads}
    options |= {"layers_per_basis": parsed.layers_per_basis, "alike": parsed.alike}
    if parsed.alpha is not None:
        if parsed.method != "asvd":
            raise RequestError(f"--alpha is for --method asvd, not {parsed.method}")
        options["alpha"] = parsed.alpha
    if parsed.ranks is not None:
        if parsed.alloc != "uniform" or parsed.rank_multiple != 1:
            raise RequestError("--ranks says every rank: leave --alloc and --rank-multiple out")
        given = read_ranks(parsed.ranks)
        if None not in (parsed.heads, given.heads) and parsed.heads != given.heads:
            raise RequestError(f"the ranks of {parsed.ranks} are for --heads {given.heads}: leave --heads out")
        options["heads"] = parsed.heads or given.heads
        return Recipe(parsed.method, None, "file", **options, ranks=given.ranks)
    costs = None
    if parsed.ms_per_token is not None:
        costs = load_costs(parsed.costs or DEFAULT_COSTS, parsed.costs_file or COSTS_FILE)
    elif parsed.costs or parsed.costs_file:
        raise RequestError("--costs and --costs-file are for --ms-per-token")
    amounts: dict[Unit, float | None] = {
        "ratio": parsed.ratio, "params": parsed.params, "bytes": parsed.bytes_per_token, "ms": parsed.ms_per_token,
    }  # fmt: skip
    target = next(Target(unit, amount, costs) for unit, amount in amounts.items() if amount is not None)
    return Recipe(parsed.method, target, parsed.alloc, **options)


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
    if parsed.resume:
        yield from _kept_conversion(parsed, path)
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
        with _called(dense, path):
            yield dense


@contextlib.contextmanager
def _called(folder: Path, source: Path) -> Iterator[None]:
    """Errors say the source, which the user knows, in place of the folder that it was converted into."""
    try:
        yield
    except FlashSVDError as error:
        error.args = (str(error).replace(str(folder), str(source)),)
        raise


def _kept_conversion(parsed: argparse.Namespace, path: Path) -> Iterator[Path]:
    """The converted model in a folder that an interruption leaves for the next call."""
    from flashsvd_jax import _siblings
    from flashsvd_jax.checkpoint.work_folder import WorkFolder

    files = {file.name: file.stat() for file in sorted(path.iterdir())} if path.is_dir() else {path.name: path.stat()}
    stamps = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in files.items()}
    destination = Path(parsed.destination)
    what = {"converted from": str(path.resolve()), "its files": stamps, "dtype": parsed.dtype}
    with WorkFolder(destination.with_name(f".{destination.name}.dense"), what) as work:
        dense = work.path / "dense"
        if not dense.is_dir():  # which appears whole
            _siblings.load("converters").convert(path, dense, dtype=parsed.dtype, progress=not parsed.quiet)
        with _called(dense, path):
            yield dense
        work.remove()
