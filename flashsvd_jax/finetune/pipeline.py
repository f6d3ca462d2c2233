"""From a compressed model's folder to one of the same layout whose factors are trained."""

import contextlib
import dataclasses
import hashlib
import os
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from flashsvd_jax import __version__
from flashsvd_jax.checkpoint import FolderWriter, ModelFolder, WeightWarning, open_folder
from flashsvd_jax.checkpoint.layout import companion_files
from flashsvd_jax.checkpoint.work_folder import WorkFolder, content_digest
from flashsvd_jax.compile_cache import enable_persistent_cache
from flashsvd_jax.config import ModelConfig
from flashsvd_jax.errors import CheckpointError, RequestError
from flashsvd_jax.finetune.settings import Settings
from flashsvd_jax.finetune.text_windows import TextWindows
from flashsvd_jax.finetune.trained import Arrays, factor_names, initial, merged
from flashsvd_jax.finetune.training import train
from flashsvd_jax.schema import stored_names
from flashsvd_jax.tokenizer import Tokenizer


def finetune(
    src: str | Path,
    dst: str | Path,
    text: str,
    settings: Settings | None = None,
    *,
    text_name: str = "text",
    resume: bool = False,
    progress: bool = True,
) -> list[float]:
    """Trains the factors of a decoder on a text; ranks, names and dtype of the result are those of the model it is made of.

    On the device are the weights, and four float32 numbers for each that is trained. The folder appears whole at ``dst``, or after
    an error not at all.

    Args:
      src: the compressed model, a folder in this project's layout.
      dst: the folder to make.
      text: what to train on.
      settings: how; the defaults if not given.
      text_name: what messages and the record call the text.
      resume: keep the state in a hidden folder beside ``dst`` now and then, and go on from the one that an interrupted call with
        the same arguments left there.
      progress: show a bar when it takes more than two seconds.

    Returns:
      The loss of each step.

    Raises:
      RequestError: the text does not suffice, the loss does not stay finite, or the model is an encoder or has no factors.
      CheckpointError: ``src`` is damaged, ``dst`` exists or cannot be written, or what is to be resumed is of other work.
    """
    settings = settings or Settings()
    if os.path.lexists(dst):
        raise CheckpointError(f"{dst} already exists; delete it or choose another destination")
    enable_persistent_cache()
    with open_folder(src) as folder, warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("error", WeightWarning)  # of no use to anybody, so nothing is written
        config, work = _compressed_decoder(folder), None
        windows = TextWindows(text, text_name, Tokenizer(folder.path), config, settings)
        digest = hashlib.sha256(text.encode()).hexdigest()
        if resume:
            what = {"version": __version__, "model": content_digest(folder.path), "text": digest}
            work = WorkFolder(Path(dst).with_name(f".{Path(dst).name}.finetune"), what | dataclasses.asdict(settings))
            stack.enter_context(work)
        trained, frozen = _on_device(folder, config, settings)
        state = train(config, trained, frozen, windows, settings, work, progress)
        note = f"{settings} on {text_name}, SHA-256 of the text {digest}"
        try:
            _write(folder, config, dst, state.trained, f"{note}; {_fall(state.losses)}")
        except WeightWarning as warning:
            raise CheckpointError(f"{warning}; nothing was written") from warning
        if work is not None:
            work.remove()
    return state.losses


def _compressed_decoder(folder: ModelFolder) -> ModelConfig:
    config = folder.config
    if not isinstance(config, ModelConfig):
        raise RequestError(f"{folder.path} is an encoder, a {config.model_type}; only decoders can be trained")
    if not config.factorization:
        raise RequestError(f"{folder.path} is dense and has no factors to train: compress it first")
    return config


def _on_device(folder: ModelFolder, config: ModelConfig, settings: Settings) -> tuple[Arrays, Arrays]:
    """What is trained, and everything else in the dtype to compute in."""
    trained = initial(config, folder.get, settings.lora, settings.seed)
    frozen = (name for name in stored_names(config) if name not in trained)
    dtype = jnp.dtype(settings.dtype)
    return trained, {name: jax.device_put(folder.get(name).astype(dtype)) for name in frozen}


def _write(folder: ModelFolder, config: ModelConfig, dst: str | Path, trained: Arrays, note: str) -> None:
    manifest = dataclasses.replace(folder.manifest, notes=(*folder.manifest.notes, note))
    factors = set(factor_names(config))
    with FolderWriter(dst, folder.hf_config, manifest, copy_files=companion_files(folder.path)) as writer:
        for name in stored_names(config):
            array = folder.get(name)
            writer.add(name, np.asarray(merged(name, jnp.asarray(array), trained)) if name in factors else array)


def _fall(losses: list[float]) -> str:
    """From where to where the loss went, each a mean of a twentieth of the steps."""
    some = max(1, len(losses) // 20)
    return f"loss from {np.mean(losses[:some]):.4f} to {np.mean(losses[-some:]):.4f}"
