"""Compresses the bundled model by every method, ratio and choice of ranks, fine-tunes some, and measures held-out perplexity.

Each result is a row of bench/results/DEVICE/compression.jsonl, `cpu` for a CPU; settings that the file has a row of are not
measured again, so a run that was interrupted goes on. `bench/report.py` makes the README's table from the rows.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jobs import append_row, results_folder

from converters import convert
from flashsvd_jax.benchmark import provenance
from flashsvd_jax.bundled import CALIBRATION, DENSE, HELDOUT
from flashsvd_jax.checkpoint import open_folder
from flashsvd_jax.compress import METHODS, Calibration, Recipe, compress
from flashsvd_jax.compress.dense_layers import DenseLayers
from flashsvd_jax.compress.ranks import Measures, choose_ranks
from flashsvd_jax.evaluation import evaluate
from flashsvd_jax.finetune import Settings, finetune

RATIOS = (0.8, 0.6, 0.4)
ALLOCATIONS = ("uniform", "greedy", "greedy alike", "v2", "fisher")
# D-Rank and AdaSVD as published, and ranks of their kind and trained ones for the factors that every other choice is measured with.
PAPERS = (
    ("basis_sharing", "effective"), ("drone", "effective"), ("svdllm", "importance"), ("drone", "importance"), ("drone", "learned"),
    ("saes", "learned"),
)  # fmt: skip
SETTINGS = ("method", "ratio", "alloc", "update", "finetune", "samples", "length", "seed")
FINETUNE = {"steps": 60, "batch": 4, "length": 512, "lr": 5e-4, "dtype": "float32"}
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Cell:
    """What a row is of; method "dense" at ratio 1 for the model as it is, ``alloc`` with " alike" behind it where layers have the
    same ranks, ``finetune`` the options where factors are trained."""

    method: str
    ratio: float
    alloc: str
    update: bool = False
    finetune: dict[str, Any] | None = None


def cells() -> Iterator[Cell]:
    """All of them, what says most first."""
    yield Cell("dense", 1.0, "uniform")
    for alloc, ratio, method in itertools.product(ALLOCATIONS, RATIOS, METHODS):
        yield Cell(method, ratio, alloc)
    for ratio in (0.6, 0.4):
        yield Cell("svdllm", ratio, "uniform", finetune=FINETUNE)
    for ratio in RATIOS:
        yield Cell("drone", ratio, "uniform", update=True)
    for method, ratio in itertools.product(("asvd", "drone"), RATIOS):
        yield Cell(method, ratio, "sensitivity")
    for ratio in RATIOS:
        yield Cell("drone", ratio, "fisher alike")
    for (method, alloc), ratio in itertools.product(PAPERS, RATIOS):
        yield Cell(method, ratio, alloc)


def settings(cell: Cell, options: argparse.Namespace) -> Row:
    """The keys by which a row is found again."""
    return dataclasses.asdict(cell) | {"samples": options.samples, "length": options.length, "seed": options.seed}


def measure(cell: Cell, dense: Path, folder: Path, options: argparse.Namespace) -> Row:
    """The row of a cell; windows' mean losses are kept, so that two rows can be compared window by window."""
    text = Calibration(
        CALIBRATION.read_text(encoding="utf-8"), CALIBRATION.name, options.samples, options.length, options.seed
    )
    begin, model = time.monotonic(), dense
    if cell.method != "dense":
        model = folder / "compressed"
        alloc, _, alike = cell.alloc.partition(" ")
        recipe = Recipe(cell.method, cell.ratio, alloc, update=cell.update, alike=bool(alike))
        if cell.alloc == "sensitivity":
            recipe = by_sensitivity(recipe, dense, text)
        compress(dense, model, recipe, text, dtype="float32", progress=False)
    seconds = time.monotonic() - begin
    if cell.finetune is not None:
        tuned = folder / "tuned"
        finetune(model, tuned, text.text, Settings(**cell.finetune), text_name=text.name, progress=False)
        model = tuned
    heldout = HELDOUT.read_text(encoding="utf-8")
    found = evaluate(model, text=heldout, text_name=HELDOUT.name, dtype="float32", progress=False)
    row = json.loads(found.to_json())
    for key in ("model", "family", "notes", "tasks", "weight_bytes"):
        del row[key]
    assert found.perplexity is not None
    losses = [[round(float(np.mean(window)), 5), len(window)] for window in found.perplexity.losses]
    return settings(cell, options) | row | {"compress_s": round(seconds, 1), "window_losses": losses}


def by_sensitivity(recipe: Recipe, dense: Path, text: Calibration) -> Recipe:
    """The same with the ranks that it leads to: the losses that they are chosen by take long, and are the same for every ratio."""
    with open_folder(dense) as folder:
        losses = _sensitivity(recipe.method, dense, text)
        ranks = choose_ranks(recipe.settled(folder.config), folder.config, 4, Measures(sensitivity=lambda: losses))
    return Recipe(recipe.method, None, "file", ranks=ranks)


@functools.cache
def _sensitivity(method: str, dense: Path, text: Calibration) -> dict[str, list[float]]:
    recipe = Recipe(method, 0.5, "sensitivity")
    with open_folder(dense) as folder:
        layers = DenseLayers(folder, folder.config, recipe.settled(folder.config), text, progress=False)
        return layers.sensitivity()


def main() -> None:
    """Measures what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=32, help="windows of the calibration text")
    parser.add_argument("--length", type=int, default=512, help="tokens of each")
    parser.add_argument("--seed", type=int, default=0, help="chooses them")
    parser.add_argument(
        "--tuned", action="store_true", help="only those that are fine-tuned, beside a run of the others"
    )
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="S", help="begin nothing after so long")
    options = parser.parse_args()
    device = jax.devices()[0]
    file = results_folder("cpu" if device.platform == "cpu" else device.device_kind) / "compression.jsonl"
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines()) if file.exists() else []
    done = [{key: row.get(key) for key in SETTINGS} for row in rows]
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        dense = Path(place, "dense")
        convert(DENSE, dense, dtype="float32", progress=False)
        for number, cell in enumerate(cells()):
            if options.tuned and cell.finetune is None:
                continue
            if settings(cell, options) in done or time.monotonic() - begin > options.budget:
                continue
            row = measure(cell, dense, Path(place, str(number)), options)
            append_row(file, row | provenance())
            print(f"{cell}: {row['perplexity']:.3f}, {row['compress_s']} s", flush=True)


if __name__ == "__main__":
    main()
