"""The two factors of a given rank that lose least, by a loss that every method of compression is a case of.

For a weight W [d_out, d_in], weights d of its rows and a second moment G of its inputs, the loss of another matrix V is
``sum_i d_i (w_i - v_i) G (w_i - v_i)^T``. With D = diag(sqrt(d)), G = S S^T and D W S = U Sigma Z^T, the loss of rank r is at least
the sum of the squares of Sigma behind the r-th, and ``D^-1 U_r U_r^T D W`` has just that loss. U are the eigenvectors of
``D W G W^T D`` too, so S is needed only where that is the larger Gram matrix, of weights with more outputs than inputs. No inverse
of S occurs, so statistics may be singular; where inputs lie in a subspace, what is left of the rank goes to the largest part of W
outside it.
"""

import dataclasses
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from flashsvd_jax.compress.float64 import Array, float64_module

# Times its norm, this is added to a second moment's eigenvalues, and weights of rows are raised to that share of the largest: what
# the text never reached then comes last, but in the order of its size, and no row is divided by zero.
_SMALLEST_EIGENVALUE = 1e-12
_SMALLEST_ROW = 1e-10
_RANK_STEP = 128
# Below this share of the largest, a direction of the latent inputs is noise of the sums that the moment is made of.
_SMALLEST_LATENT = 1e-10


@dataclasses.dataclass(frozen=True)
class Loss:
    """What counts in a weight's error; the plain sum of squares where nothing is given.

    Attributes:
      rows: [d_out], not negative: how much an error of each row counts.
      inputs: the second moment of the inputs, [d_in, d_in], or its diagonal [d_in], up to a factor.
    """

    rows: np.ndarray | None = None
    inputs: Array | None = None

    @cached_property
    def moment(self) -> Array | None:
        """G in float64, None where nothing is known of the inputs."""
        if self.inputs is None:
            return None
        with float64_module() as xp:
            moment = xp.asarray(self.inputs, xp.float64)
            return moment if moment.any() else None

    @cached_property
    def floor(self) -> Array | float:
        """What is added to each of its eigenvalues. Frobenius' norm is the largest one, or there are many of its size."""
        if self.moment is None:
            return 0.0
        with float64_module() as xp:
            return _SMALLEST_EIGENVALUE * xp.linalg.norm(self.moment)

    @cached_property
    def root(self) -> Array | None:
        """S: [d_in, d_in], or its diagonal; by eigenvectors, because a singular moment has no Cholesky factor to rely on."""
        if self.moment is None:
            return None
        with float64_module() as xp:
            if self.moment.ndim == 1:
                return xp.sqrt(self.moment + self.floor)
            values, vectors = xp.linalg.eigh(self.moment)
            return vectors * xp.sqrt(xp.maximum(values, 0.0) + self.floor)

    def trace(self, d_out: int, d_in: int) -> float:
        """The sum over a weight's entries of what an error of each alone counts."""
        rows = d_out if self.rows is None else self.rows.sum(dtype=np.float64)
        moment, columns = self.moment, float(d_in)
        if moment is not None:
            with float64_module():
                columns = float((moment if moment.ndim == 1 else moment.diagonal()).sum())
        return float(rows * columns)

    def target(self, weight: np.ndarray, rank: int) -> Array:
        """The matrix that factors of a rank are to be near to by this loss: the weight itself, where nothing else is aimed at."""
        return weight


class Factors(NamedTuple):
    """A weight as ``up @ down``: [d_out, rank] and [rank, d_in] in float64, each component's size split evenly between them."""

    up: np.ndarray
    down: np.ndarray


def factorize(weight: np.ndarray, rank: int, loss: Loss) -> Factors:
    """The factors of a rank, at most the smaller side, with the least loss; computed in float64."""
    row_scale = _row_scale(weight, loss)
    target = loss.target(weight, rank)
    with float64_module() as xp:
        scaled = xp.asarray(row_scale[:, None]) * xp.asarray(target, xp.float64)
        left = leading_left_vectors(scaled, computed_rank(rank, weight, xp), loss, xp)
        up, down = left / row_scale[:, None], left.T @ scaled
        sizes, others = xp.linalg.norm(down, axis=1), xp.linalg.norm(up, axis=0)
        balance = xp.sqrt(xp.where(sizes > 0, sizes, others) / others)
        return Factors(np.asarray(up * balance)[:, :rank], np.asarray(down / balance[:, None])[:rank])


def refit(weight: np.ndarray, factors: Factors, moment: Array) -> Factors:
    """The same first factor with the second one that loses least for another second moment of the inputs, [d_in, d_in].

    Least squares, as SVD-LLM's update of U. Where these inputs leave the second factor open, it stays as it is.
    """
    with float64_module() as xp:
        dense, up, down = (xp.asarray(array, xp.float64) for array in (weight, *factors))
        seen = xp.asarray(moment, xp.float64) @ down.T
        missed = (dense - up @ down) @ seen
        fitted = up + missed @ xp.linalg.pinv(down @ seen, rtol=_SMALLEST_LATENT, hermitian=True)
        return Factors(np.asarray(fitted), np.asarray(down))


def gains(weight: np.ndarray, loss: Loss) -> np.ndarray:
    """What each further rank takes off the loss, [smaller side] in float64, the most first; their sum is the loss of rank 0."""
    row_scale = _row_scale(weight, loss)
    with float64_module() as xp:
        scaled = xp.asarray(row_scale[:, None]) * xp.asarray(weight, xp.float64)
        if scaled.shape[0] <= scaled.shape[1]:
            gram = _outer_gram(scaled, loss)
        else:
            matrix = times_root(scaled, loss)
            gram = matrix.T @ matrix
        return np.maximum(np.asarray(xp.linalg.eigvalsh(gram))[::-1], 0.0)


def computed_rank(rank: int, weight: Array, xp: Any) -> int:
    """JAX compiles anew for each rank, so it computes some more components and few different numbers of them."""
    return rank if xp is np else min(-(-rank // _RANK_STEP) * _RANK_STEP, *weight.shape)


def _row_scale(weight: np.ndarray, loss: Loss) -> np.ndarray:
    """The diagonal of D."""
    if loss.rows is None or not loss.rows.any():
        return np.ones(weight.shape[0])
    rows = loss.rows.astype(np.float64)
    return np.sqrt(np.maximum(rows, _SMALLEST_ROW * rows.max()))


def _outer_gram(scaled: Array, loss: Loss) -> Array:
    """D W G W^T D, [d_out, d_out], from D W."""
    moment = loss.moment
    if moment is None:
        return scaled @ scaled.T
    if moment.ndim == 1:
        return (scaled * (moment + loss.floor)) @ scaled.T
    return (scaled @ moment + loss.floor * scaled) @ scaled.T


def times_root(scaled: Array, loss: Loss) -> Array:
    """D W S from D W."""
    if loss.root is None:
        return scaled
    return scaled * loss.root if loss.root.ndim == 1 else scaled @ loss.root


def leading_left_vectors(scaled: Array, rank: int, loss: Loss, xp: Any) -> Array:
    """Orthonormal columns [d_out, rank] that span D W S's leading left singular vectors, through the smaller side's Gram matrix.

    Squaring blurs only directions below the square root of float64's precision, which lose nothing that counts.
    """
    if scaled.shape[0] <= scaled.shape[1]:
        return xp.linalg.eigh(_outer_gram(scaled, loss))[1][:, ::-1][:, :rank]
    matrix = times_root(scaled, loss)
    right = xp.linalg.eigh(matrix.T @ matrix)[1][:, ::-1][:, :rank]
    return xp.linalg.qr(matrix @ right)[0]  # orthonormal even where a column vanishes
