"""Factorized models on disk: a folder of safetensors with a manifest, or an Orbax checkpoint (`orbax_io`)."""

from flashsvd_jax.checkpoint.manifest import Manifest, SourceFile
from flashsvd_jax.checkpoint.reader import ModelFolder, load_params, open_folder
from flashsvd_jax.checkpoint.writer import FolderWriter, WeightWarning, save_params

__all__ = [
    "FolderWriter",
    "Manifest",
    "ModelFolder",
    "SourceFile",
    "WeightWarning",
    "load_params",
    "open_folder",
    "save_params",
]
