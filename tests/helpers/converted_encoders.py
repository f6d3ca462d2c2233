"""Encoders converted in float32, and what the folders give."""

from pathlib import Path
from typing import Any

import numpy as np

from converters import ConversionReport, convert
from flashsvd_jax.checkpoint import load_params, open_folder
from flashsvd_jax.encoder_config import EncoderConfig
from flashsvd_jax.models.encoder import outputs
from flashsvd_jax.models.encoder_weights import encoder_weights_from_params

TOKENS = np.random.default_rng(0).integers(5, 67, (2, 9)).astype(np.int32)


def folder_outputs(path: Path, tokens: np.ndarray = TOKENS) -> np.ndarray:
    with open_folder(path) as folder:
        config = folder.config
    assert isinstance(config, EncoderConfig)
    return np.asarray(outputs(config, encoder_weights_from_params(config, load_params(path, "float32")), tokens))


def converted(source: Path, folder: Path, **options: Any) -> ConversionReport:
    return convert(source, folder / "out", dtype="float32", progress=False, **options)
