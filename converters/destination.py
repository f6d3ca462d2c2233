"""Checks of a place to write to, before any work is done."""

import os
import shutil
from pathlib import Path

from flashsvd_jax.errors import ConversionError


def refuse_existing(dst: Path) -> None:
    """Raises ConversionError if there is something at ``dst``."""
    if os.path.lexists(dst):
        raise ConversionError(f"{dst} already exists; delete it or choose another destination")


def check_space(dst: Path, needed: int) -> None:
    """Raises ConversionError if fewer bytes than ``needed`` are free where ``dst`` is to be."""
    existing = next(folder for folder in dst.absolute().parents if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ConversionError(f"{dst} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free there; free some space")
