"""A source that gives the tensors of another one under other names, or in other layouts."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from converters.sources.base import TensorInfo, TensorSource


class WrappedSource(TensorSource):
    """Begins as the other source; subclasses change `_infos`, or add tensors with `_make`. Closing this closes the other.

    Attributes:
      hf: what the base model's configuration must say in addition for the model to be the one that was saved.
      notes: what the report should say, one sentence each.
    """

    def __init__(self, source: TensorSource):
        self.path, self.files = source.path, source.files
        self.embedded_config, self.unknown_globals = source.embedded_config, source.unknown_globals
        self.hf: dict[str, Any] = {}
        self.notes: tuple[str, ...] = ()
        self._source = source
        self._infos = dict(source.infos())
        self._makers: dict[str, Callable[[], np.ndarray]] = {}
        # Of projections by the name here of their first weight, see `output`.
        self._outputs: dict[str, Callable[[np.ndarray], np.ndarray]] = {}

    def infos(self) -> Mapping[str, TensorInfo]:
        """Tensors by their names here; an entry's own name is the one it is stored under, unless it is made here."""
        return self._infos

    def get(self, name: str) -> np.ndarray:
        """A tensor by its name here or the one it is stored under."""
        stored = self._infos[name].name if name in self._infos else name
        return self._makers[stored]() if stored in self._makers else self._source.get(stored)

    def close(self) -> None:
        self._source.close()

    def output(self, first: str, x: np.ndarray) -> np.ndarray | None:
        """What a projection without its bias makes of x [tokens, d_in] in the order that its authors compute it, in float64.

        ``first`` is the name here of its first weight. None where weights are applied one after the other as they are.
        """
        compute = self._outputs.get(first)
        return None if compute is None else compute(x)

    def _make(
        self, name: str, shape: tuple[int, ...], make: Callable[[], np.ndarray], like: TensorInfo, dtype: np.dtype
    ) -> None:
        """Adds a tensor that is computed each time it is asked for; ``like`` is one that it is made of."""
        self._infos[name] = replace(like, name=name, shape=shape, dtype=dtype, identity=(name, like.identity))
        self._makers[name] = make

    def _float64(self, name: str) -> np.ndarray:
        """A tensor of the other source."""
        return self._source.get(name).astype(np.float64)
