"""The two factors of a given rank that lose least, by a loss that every method of compression is a case of.

For a weight W [d_out, d_in], weights d of its rows and a second moment G of its inputs, the loss of another matrix V is
``sum_i d_i (w_i - v_i) G (w_i - v_i)^T``. With D = diag(sqrt(d)), G = S S^T and D W S = U Sigma Z^T, the loss of rank r is at least
the sum of the squares of Sigma behind the r-th, and ``D^-1 U_r U_r^T D W`` has just that loss. No inverse of S occurs in it, so
statistics may be singular; where inputs lie in a subspace, what is left of the rank goes to the largest part of W outside it.
"""

import dataclasses
from functools import cached_property
from typing import NamedTuple

import numpy as np

# Below these shares of the largest, eigenvalues of a second moment and weights of rows are raised to them: what the text never
# reached then comes last, but in the order of its size, and no row is divided by zero.
_SMALLEST_EIGENVALUE = 1e-12
_SMALLEST_ROW = 1e-10
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
    inputs: np.ndarray | None = None

    @cached_property
    def root(self) -> np.ndarray | None:
        """S: [d_in, d_in], or its diagonal; by eigenvectors, because a singular moment has no Cholesky factor to rely on."""
        if self.inputs is None or not self.inputs.any():
            return None
        moment = self.inputs.astype(np.float64)
        values, vectors = (moment, None) if moment.ndim == 1 else np.linalg.eigh(moment)
        sizes = np.sqrt(np.maximum(values, _SMALLEST_EIGENVALUE * values.max()))
        return sizes if vectors is None else vectors * sizes

    def trace(self, d_out: int, d_in: int) -> float:
        """The sum over a weight's entries of what an error of each alone counts."""
        rows = d_out if self.rows is None else self.rows.sum(dtype=np.float64)
        moment = self.inputs
        columns = d_in if moment is None else (moment if moment.ndim == 1 else moment.diagonal()).sum(dtype=np.float64)
        return float(rows * columns)


class Factors(NamedTuple):
    """A weight as ``up @ down``: [d_out, rank] and [rank, d_in] in float64, each component's size split evenly between them."""

    up: np.ndarray
    down: np.ndarray


def factorize(weight: np.ndarray, rank: int, loss: Loss) -> Factors:
    """The factors of a rank, at most the smaller side, with the least loss; computed in float64."""
    row_scale = _row_scale(weight, loss)
    scaled = row_scale[:, None] * weight.astype(np.float64)
    left = _leading_left_vectors(_times_root(scaled, loss), rank)
    up, down = left / row_scale[:, None], left.T @ scaled
    sizes, others = np.linalg.norm(down, axis=1), np.linalg.norm(up, axis=0)
    balance = np.sqrt(np.where(sizes > 0, sizes, others) / others)
    return Factors(up * balance, down / balance[:, None])


def refit(weight: np.ndarray, factors: Factors, moment: np.ndarray) -> Factors:
    """The same first factor with the second one that loses least for another second moment of the inputs, [d_in, d_in].

    Least squares, as SVD-LLM's update of U. Where these inputs leave the second factor open, it stays as it is.
    """
    moment, down = moment.astype(np.float64), factors.down.astype(np.float64)
    seen = moment @ down.T
    missed = (weight.astype(np.float64) - factors.up @ down) @ seen
    return Factors(factors.up + missed @ np.linalg.pinv(down @ seen, rcond=_SMALLEST_LATENT, hermitian=True), down)


def gains(weight: np.ndarray, loss: Loss) -> np.ndarray:
    """What each further rank takes off the loss, [smaller side] in float64, the most first; their sum is the loss of rank 0."""
    scaled = _times_root(_row_scale(weight, loss)[:, None] * weight.astype(np.float64), loss)
    gram = scaled @ scaled.T if scaled.shape[0] <= scaled.shape[1] else scaled.T @ scaled
    return np.maximum(np.linalg.eigvalsh(gram)[::-1], 0.0)


def _row_scale(weight: np.ndarray, loss: Loss) -> np.ndarray:
    """The diagonal of D."""
    if loss.rows is None or not loss.rows.any():
        return np.ones(weight.shape[0])
    rows = loss.rows.astype(np.float64)
    return np.sqrt(np.maximum(rows, _SMALLEST_ROW * rows.max()))


def _times_root(scaled: np.ndarray, loss: Loss) -> np.ndarray:
    """D W S from D W."""
    if loss.root is None:
        return scaled
    return scaled * loss.root if loss.root.ndim == 1 else scaled @ loss.root


def _leading_left_vectors(matrix: np.ndarray, rank: int) -> np.ndarray:
    """Orthonormal columns [d_out, rank] that span the leading left singular vectors, through the smaller side's Gram matrix.

    Squaring blurs only directions below the square root of float64's precision, which lose nothing that counts.
    """
    if matrix.shape[0] <= matrix.shape[1]:
        return np.linalg.eigh(matrix @ matrix.T)[1][:, ::-1][:, :rank]
    right = np.linalg.eigh(matrix.T @ matrix)[1][:, ::-1][:, :rank]
    return np.linalg.qr(matrix @ right)[0]  # orthonormal even where a column vanishes
