"""Several checkpoints that together hold one model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from converters.sources.base import TensorInfo, TensorSource
from flashsvd_jax.errors import CheckpointError


class JoinedSource(TensorSource):
    """The tensors of open sources under names of their own; closing this closes them all."""

    def __init__(self, path: Path, sources: Sequence[TensorSource], name_of: Callable[[int, str], str | None]):
        """Joins the sources.

        Args:
          path: what the user named.
          sources: each must be open.
          name_of: number of a source and the name of a tensor there -> its name here, None to leave it out.

        Raises:
          CheckpointError: two tensors would have one name.
        """
        self.path = path
        self.files = tuple(file for source in sources for file in source.files)
        self.unknown_globals = tuple(sorted({name for source in sources for name in source.unknown_globals}))
        self._sources = sources
        self._places: dict[str, tuple[TensorSource, str]] = {}
        self._infos: dict[str, TensorInfo] = {}
        for number, source in enumerate(sources):
            for stored, info in source.infos().items():
                name = name_of(number, stored)
                if name is None:
                    continue
                if name in self._infos:
                    raise CheckpointError(f"{info.file} and {self._infos[name].file} both hold {name}")
                self._places[name] = source, stored
                self._infos[name] = replace(info, name=name, identity=(number, info.identity))

    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def get(self, name: str) -> np.ndarray:
        if name not in self._places:
            raise CheckpointError(f"{self.path} has no tensor {name}")
        source, stored = self._places[name]
        return source.get(stored)

    def close(self) -> None:
        for source in self._sources:
            source.close()
