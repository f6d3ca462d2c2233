"""A random dense checkpoint of a published shape in Hugging Face's form, with the bundled tokenizer."""

import json
import os
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from converters.naming import torch_name
from flashsvd_jax.bundled import DENSE
from flashsvd_jax.checkpoint.layout import CONFIG_FILE, INDEX_FILE, companion_files, shard_file
from flashsvd_jax.config import ModelConfig
from flashsvd_jax.schema import ParamSpec, schema
from flashsvd_jax.shapes import SHAPES

NAMES = tuple(name for name, config in SHAPES.items() if config["model_type"] in ("llama", "qwen3"))
"""Shapes whose checkpoints have the names of Llama's."""


def write_checkpoint(folder: Path, name: str, layers: int | None = None, seed: int = 0) -> ModelConfig:
    """Writes it in bfloat16, a file for each layer and one for the rest; the index, last of all, says that it is whole.

    Columns of weights fall in size as the square root of a power law, in an order of their own for each, so that no spectrum is
    flat; norms scale by one. One seed gives the same values on every machine.

    Args:
      folder: to write to, made if it is not there.
      name: one of `NAMES`.
      layers: how many, if not all.
      seed: of the values.
    """
    hf_config: dict[str, Any] = {**SHAPES[name], "torch_dtype": "bfloat16", "tie_word_embeddings": False}
    hf_config |= {"num_hidden_layers": layers or hf_config["num_hidden_layers"], "bos_token_id": 0, "eos_token_id": 0}
    config = ModelConfig.from_hf(hf_config)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps(hf_config, indent=2) + "\n", encoding="utf-8")
    for file in companion_files(DENSE):
        if file.name.startswith("tokenizer"):
            shutil.copy(file, folder / file.name)
    files: dict[str, dict[str, ParamSpec]] = {}
    for array, spec in schema(config).items():
        files.setdefault(array.partition(".")[0] if array.startswith("layers_") else "rest", {})[array] = spec
    named = {shard_file(number, len(files)): specs for number, specs in enumerate(files.values(), 1)}
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # each holds a layer, twice
        list(pool.map(lambda file: _write_file(folder / file, named[file], seed), named))
    weight_map = {torch_name(array): file for file, specs in named.items() for array in specs}
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    return config


def _write_file(file: Path, specs: dict[str, ParamSpec], seed: int) -> None:
    save_file({torch_name(name): _drawn(name, spec.shape, seed) for name, spec in specs.items()}, file)


def _drawn(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    if len(shape) == 1:
        return np.ones(shape, ml_dtypes.bfloat16)
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    sizes = rng.permutation(np.arange(1.0, shape[1] + 1) ** -0.25)
    drawn = rng.standard_normal(shape, np.float32)
    drawn *= (sizes / np.linalg.norm(sizes)).astype(np.float32)
    return drawn.astype(ml_dtypes.bfloat16)
