"""Dobi-SVD's remapped weights: factors stored as 8-bit codes beside the rest of the model."""

from functools import partial

import numpy as np

from converters.sources.base import TensorSource
from converters.sources.wrapped_source import WrappedSource
from flashsvd_jax.errors import CheckpointError

CODES_FILE = "remapping_weight.pt"

_PARTS = ("us_quan", "vt_quan", "us_absmax", "vt_absmax")
_TAIL = "tuple_info.1"  # of a pair whose first member says which factor it continues; so do the shapes
_DTYPES = {"us_quan": np.uint8, "vt_quan": np.uint8} | dict.fromkeys(("us_absmax", "vt_absmax", _TAIL), np.float16)


def dynamic_map() -> np.ndarray:
    """What the codes stand for: bitsandbytes' signed dynamic map of 8 bits, 256 float32 values in ascending order."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = _linspace(0.1, 1, 2**exponent + 1)
        means = np.float32(10 ** (exponent - 6)) * ((edges[:-1] + edges[1:]) / np.float32(2))
        values += [*means, *-means]
    return np.sort(np.array(values, np.float32))


def _linspace(start: float, end: float, count: int) -> np.ndarray:
    """As PyTorch computes it, to the bit: a step in float32, from both ends to the middle, each value rounded once."""
    first, last = np.float32(start), np.float32(end)
    step, index = np.float64((last - first) / np.float32(count - 1)), np.arange(count)
    values = np.where(index < count // 2, first + step * index, last - step * (count - 1 - index))
    return values.astype(np.float32)


class RemappedSource(WrappedSource):
    """The rest of a model and its factors, `<module>.vt.weight` [rank, d_in] and `<module>.us.weight` [d_out, rank].

    A factor is decoded to float16 each time it is asked for, as the published loader does it: float32 products, rounded
    once.
    """

    def __init__(self, rest: TensorSource, codes: TensorSource):
        """Joins two open files; closing this closes both. Raises CheckpointError for codes that form no factors."""
        super().__init__(rest)
        self.files = (*rest.files, *codes.files)
        self.unknown_globals = tuple(sorted({*rest.unknown_globals, *codes.unknown_globals}))
        self._codes, self._map = codes, dynamic_map()
        suffix = ".us_quan"
        modules = [name.removesuffix(suffix) for name in codes.infos() if name.endswith(suffix)]
        for module in modules:
            self._add(module)
        known = {f"{module}.{part}" for module in modules for part in (*_PARTS, _TAIL)}
        strange = [name for name in codes.infos() if name not in known]
        if strange or not modules:
            raise CheckpointError(f"{codes.path} holds no codes of factors: {strange[0] if strange else 'no us_quan'}")

    def _decoded(self, module: str, factor: str, shape: tuple[int, ...]) -> np.ndarray:
        """A factor, ``us`` or ``vt``."""
        codes, absmax = (self._codes.get(f"{module}.{factor}_{part}") for part in ("quan", "absmax"))
        rows = self._map[codes] * absmax.astype(np.float32)[:, None]
        rows = rows.astype(np.float16)
        if shape == rows.shape[:: -1 if factor == "us" else 1]:
            return rows.T if factor == "us" else rows
        tail = self._codes.get(f"{module}.{_TAIL}")
        return np.concatenate((rows.T, tail)) if factor == "us" else np.concatenate((rows, tail), axis=1)

    def close(self) -> None:
        super().close()
        self._codes.close()

    def _add(self, module: str) -> None:
        """Describes both factors of a projection after checking the shapes of what they are made from."""
        infos = self._codes.infos()
        parts = {part: infos.get(f"{module}.{part}") for part in (*_PARTS, _TAIL)}
        for part, info in parts.items():
            if info is None and part != _TAIL:
                raise CheckpointError(f"{self._codes.path} lacks {module}.{part}")
            if info is not None and info.dtype != _DTYPES[part]:
                raise CheckpointError(f"{self._codes.path}: {info.name} is {info.dtype}, not {np.dtype(_DTYPES[part])}")
        shapes = {part: info.shape for part, info in parts.items() if info is not None}
        codes, rank = shapes["us_quan"], shapes["us_quan"][0] if shapes["us_quan"] else 0
        tail = shapes.get(_TAIL, (0, rank))
        continues_us = len(tail) == 2 and tail[1] == rank
        continues_vt = len(tail) == 2 and tail[0] == rank and not continues_us
        fits = len(codes) == 2 and codes == shapes["vt_quan"] and continues_us | continues_vt
        if not fits or shapes["us_absmax"] != (rank,) or shapes["vt_absmax"] != (rank,):
            raise CheckpointError(f"{self._codes.path}: the shapes of {module} form no two factors: {shapes}")
        d_out, d_in = codes[1] + tail[0] * continues_us, codes[1] + tail[1] * continues_vt
        for factor, shape in (("vt", (rank, d_in)), ("us", (d_out, rank))):
            make = partial(self._decoded, module, factor, shape)
            stored = infos[f"{module}.{factor}_quan"]
            self._make(f"{module}.{factor}.weight", shape, make, stored, np.dtype(np.float16))
