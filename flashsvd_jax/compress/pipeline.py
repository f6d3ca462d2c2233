"""From a dense model's folder to a compressed one, layer by layer."""

import contextlib
import dataclasses
import os
import warnings
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from flashsvd_jax import __version__
from flashsvd_jax.any_config import AnyConfig
from flashsvd_jax.checkpoint import FolderWriter, Manifest, ModelFolder, WeightWarning, open_folder
from flashsvd_jax.checkpoint.layout import companion_files
from flashsvd_jax.checkpoint.manifest import DTYPES
from flashsvd_jax.checkpoint.work_folder import WorkFolder, content_digest
from flashsvd_jax.compile_cache import enable_persistent_cache
from flashsvd_jax.compress.calibration import Calibration
from flashsvd_jax.compress.layerwise import LayerwiseCompression
from flashsvd_jax.compress.recipe import Recipe
from flashsvd_jax.errors import CheckpointError, RequestError
from flashsvd_jax.factorization import Factorization
from flashsvd_jax.schema import count_params


def compress(
    src: str | Path,
    dst: str | Path,
    recipe: Recipe,
    calibration: Calibration | None = None,
    *,
    dtype: str | None = None,
    resume: bool = False,
    progress: bool = True,
) -> None:
    """Compresses a dense decoder or encoder; the folder appears whole at ``dst``, or after an error not at all.

    In memory are the weights and statistics of one layer, or of those that share a basis, a file of the result, and the residual
    stream of the calibration text, float32 [samples, length, embed]; twice that with an update, or a method that aims at the dense
    model's outputs. FWSVD has the whole model and its gradients on the device, ranks by sensitivity the whole model, learned ones
    its factors at whole rank, too.

    Args:
      src: the dense model, a folder in this project's layout.
      dst: the folder to make.
      recipe: how.
      calibration: the text, where the recipe reads one (`Recipe.reads_text`).
      dtype: of the stored arrays; that of ``src`` if not given.
      resume: keep finished layers in a hidden folder beside ``dst`` until all are done, and go on from those that an interrupted
        call with the same arguments left there.
      progress: show bars for what takes longer than two seconds.

    Raises:
      RequestError: the text does not suffice, the target does not, the recipe is not for models of this kind, or the model is
        factorized already.
      CheckpointError: ``src`` is damaged or not finite, ``dst`` exists or cannot be written, or what is to be resumed is of
        another model, recipe or text.
    """
    if os.path.lexists(dst):
        raise CheckpointError(f"{dst} already exists; delete it or choose another destination")
    if dtype is not None and dtype not in DTYPES:
        raise RequestError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    enable_persistent_cache()
    with open_folder(src) as folder, warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("error", WeightWarning)  # of no use to anybody, so nothing is written
        stored = dtype or folder.manifest.dtype
        config = _dense(folder)
        recipe = recipe.settled(config)
        run = LayerwiseCompression(folder, config, recipe, calibration, jnp.dtype(stored), progress)
        if resume:
            dst = Path(dst)
            what = _what(folder, recipe, calibration, stored)
            run.work = stack.enter_context(WorkFolder(dst.with_name(f".{dst.name}.resume"), what))
        factorization = run.factorization()
        manifest = _manifest(folder, recipe, calibration, factorization, stored)
        try:
            companions = companion_files(folder.path)
            with FolderWriter(dst, folder.hf_config, manifest, copy_files=companions, progress=progress) as writer:
                run.write(writer, factorization)
        except WeightWarning as warning:
            raise CheckpointError(f"{warning}; nothing was written: choose a dtype of a wider range") from warning
        if run.work is not None:
            run.work.remove()


def _dense(folder: ModelFolder) -> AnyConfig:
    config = folder.config
    if config.factorization:
        raise RequestError(
            f"{folder.path} is factorized already ({folder.manifest.family}, {len(config.factorization.ranks)} low-rank sites);"
            " compress the dense model it was made from"
        )
    return config


def _manifest(
    folder: ModelFolder, recipe: Recipe, calibration: Calibration | None, factorization: Factorization, dtype: str
) -> Manifest:
    dense = folder.manifest
    config = type(folder.config).from_hf(folder.hf_config, factorization)
    read = recipe.reads_text and calibration is not None
    return Manifest(
        family=recipe.method,
        dtype=dtype,
        factorization=factorization,
        params=count_params(config),
        params_dense=count_params(folder.config),
        base_model=dense.base_model,
        sources=dense.sources,
        notes=(*dense.notes, str(recipe), *([str(calibration)] if read else [])),
    )


def _what(folder: ModelFolder, recipe: Recipe, calibration: Calibration | None, dtype: str) -> dict[str, Any]:
    """All that the finished layers depend on, for those who come back to them."""
    return {
        "version": __version__,
        "model": content_digest(folder.path),
        "recipe": dataclasses.asdict(recipe),
        "text": str(calibration) if recipe.reads_text else None,
        "dtype": dtype,
    }
