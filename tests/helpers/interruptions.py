"""Compression that is interrupted, and what it left."""

from pathlib import Path
from typing import Any

import pytest

from flashsvd_jax.compress.layerwise import LayerwiseCompression


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def interrupt_at(monkeypatch: pytest.MonkeyPatch, *layers: int) -> None:
    """Ends a run when it begins to compress one of these layers."""
    whole = LayerwiseCompression._compressed

    def compressed(run: Any, block: range, *args: Any) -> Any:
        if set(block) & set(layers):
            raise KeyboardInterrupt
        return whole(run, block, *args)

    monkeypatch.setattr(LayerwiseCompression, "_compressed", compressed)
