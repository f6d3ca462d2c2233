"""Projections of one input, dense or low rank, computed together.

Several projections read the same activations (q, k and v; gate and up). Their first matrices, the `down` factors of the low-rank
ones and the whole weights of the dense ones, are stacked by rows into one array, so that one product over the input serves all:

    first  [rows, d_in]               member i owns rows starts[i] : starts[i] + widths[i]
    widths[i]                         the rank of a low-rank member, d_out of a dense one
    ups[i] [d_out_i, width_i]         None for a dense member, whose product is already its output

A second factor may be block-diagonal, [groups, d_out_i / groups, width_i / groups]: each group of outputs, such as a head's, reads
its own share of the latent.

Members whose `down` is one array share its rows.

Every matrix keeps its contraction axis last, as checkpoints store it and as matrix-vector kernels read it.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Projection:
    """A weight [d_out, d_in]: dense, or the product ``up @ down`` of two factors, with an optional bias on the output.

    Attributes:
      weight: [d_out, d_in] of a dense projection, else None.
      down: [rank, d_in] of a low-rank one, else None; [groups * rank, d_in] where ``up`` is block-diagonal.
      up: [d_out, rank] of a low-rank one, else None; [groups, d_out / groups, rank] where it is block-diagonal.
      bias: [d_out] or None.
    """

    weight: jax.Array | None = None
    down: jax.Array | None = None
    up: jax.Array | None = None
    bias: jax.Array | None = None

    @property
    def is_low_rank(self) -> bool:
        return self.weight is None

    @property
    def rank(self) -> int | None:
        """Inner width of the factors, of one group where there are several; None for a dense projection."""
        return self.up.shape[-1] if self.up is not None else None

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in), whichever way the weight is held."""
        if self.down is not None and self.up is not None:
            return math.prod(self.up.shape[:-1]), self.down.shape[1]
        assert self.weight is not None
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def ndim(self) -> int:
        return 2

    @property
    def dtype(self) -> jnp.dtype:
        return self._matrices[0].dtype

    @property
    def nbytes(self) -> int:
        """Bytes held, and read once by every product with a vector."""
        arrays = [*self._matrices, *([] if self.bias is None else [self.bias])]
        return sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays)

    @property
    def _matrices(self) -> list[jax.Array]:
        return [m for m in (self.weight, self.down, self.up) if m is not None]

    def __jax_array__(self) -> jax.Array:
        """The weight [d_out, d_in] without bias, so that the projection can stand where an array can."""
        if self.down is not None and self.up is not None:
            down = by_group(self.down, self.up)
            wide = jnp.einsum("...or,...ri->...oi", self.up, down, preferred_element_type=jnp.float32)
            return wide.reshape(self.shape).astype(self.dtype)
        assert self.weight is not None
        return self.weight

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The same for numpy."""
        return np.asarray(self.__jax_array__(), dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedProjection:
    """Projections of one input with their first matrices stacked; see the module's text for the layout."""

    first: jax.Array
    ups: tuple[jax.Array | None, ...]
    biases: tuple[jax.Array | None, ...]
    starts: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    widths: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def d_outs(self) -> tuple[int, ...]:
        return tuple(
            width if up is None else math.prod(up.shape[:-1]) for up, width in zip(self.ups, self.widths, strict=True)
        )


def groups_of(up: Any) -> int:
    """How many groups of outputs a second factor has: 1 unless it is block-diagonal."""
    return up.shape[0] if up.ndim == 3 else 1


def by_group(down: Any, up: Any) -> Any:
    """A first factor as its second one reads it: [groups, rank, d_in] where that is block-diagonal, else as it is."""
    return down.reshape(*up.shape[:-2], up.shape[-1], -1)


def hardware_rank(rank: int) -> int:
    """The padded rank that a GPU reads best: whole 128-element rows where that adds little, else whole 32-byte sectors."""
    coarse = -(-rank // 128) * 128
    return coarse if coarse <= 1.05 * rank else -(-rank // 16) * 16


def pack(projections: Sequence[Projection], pad_rank: Callable[[int], int] = lambda rank: rank) -> PackedProjection:
    """Stacks projections of one input, padding each rank to ``pad_rank(rank)`` with zero rows and columns.

    Padding both factors keeps the product exact: a padded latent is zero, and what it would be multiplied with is zero too.
    Arrays of numpy stay with numpy, so that weights can be packed before they reach the device.
    """
    xp: ModuleType = np if all(isinstance(a, np.ndarray) for a in jax.tree.leaves(list(projections))) else jnp
    firsts: list[Any] = []
    ups, starts, widths = [], [], []
    place: dict[tuple[int, int], tuple[int, int]] = {}
    rows = 0
    for p in projections:
        original, up = (p.weight, None) if p.up is None else (p.down, p.up)
        assert original is not None
        extra = 0 if up is None else pad_rank(up.shape[-1]) - up.shape[-1]
        key = id(original), 1 if up is None else groups_of(up)  # other groups are padded in other places
        if key not in place:
            padded = (
                _padded(xp, by_group(original, up), -2, extra).reshape(-1, original.shape[1]) if extra else original
            )
            firsts.append(padded)
            place[key] = rows, padded.shape[0]
            rows += padded.shape[0]
        start, width = place[key]
        if up is not None and extra:
            up = _padded(xp, up, -1, extra)
        ups.append(up)
        starts.append(start)
        widths.append(width)
    first: Any = firsts[0] if len(firsts) == 1 else xp.concatenate(firsts)
    return PackedProjection(first, tuple(ups), tuple(p.bias for p in projections), tuple(starts), tuple(widths))


def _padded(xp: ModuleType, array: Any, axis: int, extra: int) -> Any:
    """An array with zeros behind it along one axis."""
    widths = [(0, 0)] * array.ndim
    widths[axis] = 0, extra
    return xp.pad(array, widths)
