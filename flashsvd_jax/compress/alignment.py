"""Factors whose outputs are near the dense model's, though their inputs are no longer the dense model's (SAES-SVD, AA-SVD).

For inputs X as the compressed layers before give them, the dense model's inputs X0 of the same tokens and a strength b, outputs V X
are to be near ``W (X + b (X0 - X))``. With H = X X^T and D = (X0 - X) X^T, the matrix that comes nearest is ``W + b W D H^-1``, and
what is left of the loss is that of factors of this matrix for inputs X. SAES-SVD (Hu et al. 2026) takes the singular vectors of
``W (H + b D) H^-1/2``, which is the same; AA-SVD (2026) aims at the dense model's outputs alone, a strength of 1, before it trains
blocks, which is not done here. Where no input reaches, the weight stays as it is.
"""

import dataclasses
from functools import cached_property
from typing import Any

import numpy as np

from flashsvd_jax.compress.factors import Loss, computed_rank, leading_left_vectors, times_root
from flashsvd_jax.compress.float64 import Array, float64_module

# As a share of each input's second moment, added to it before the inverse, as in SAES-SVD: of directions that hold less than that,
# which are rounding errors of float32, nothing is learned. Inputs that are weak beside what other eigenvalues get added would make
# that count, multiplied by what such an input is taken to say of stronger ones; they are brought above it.
_RIDGE = 1e-6
_FLOORS = 100.0
STRENGTHS = (0.125, 0.792)
"""Between which SAES-SVD chooses one: the bounds that its paper draws in figure 6; it says only that they keep from too much."""


@dataclasses.dataclass(frozen=True)
class AlignedLoss(Loss):
    """A loss of outputs between the weight's own and the dense model's.

    Attributes:
      shift: D, [d_in, d_in], up to the factor that `inputs` is up to.
      strength: b, from 0 to 1; None where it is chosen for each weight and rank.
    """

    shift: Array | None = None
    strength: float | None = None

    @cached_property
    def correction(self) -> Array | None:
        """D H^-1, [d_in, d_in], finite for a singular H, too; inputs are brought to one size first, for some are large by far."""
        if self.moment is None or self.shift is None:
            return None
        with float64_module() as xp:
            sizes = xp.sqrt(self.moment.diagonal() + _FLOORS * self.floor)
            correlations = (self.moment + _FLOORS * self.floor * xp.eye(len(sizes))) / sizes / sizes[:, None]
            shift = xp.asarray(self.shift, xp.float64) / sizes
            return xp.linalg.solve(correlations + _RIDGE * xp.eye(len(sizes)), shift.T).T / sizes

    def target(self, weight: np.ndarray, rank: int) -> Array:
        """W + b W D H^-1, float64."""
        if self.correction is None:
            return weight
        with float64_module() as xp:
            dense = xp.asarray(weight, xp.float64)
            change = dense @ self.correction
            strength = self._chosen(dense, change, rank, xp) if self.strength is None else self.strength
            return dense + strength * change

    def _chosen(self, dense: Array, change: Array, rank: int, xp: Any) -> float:
        """The strength for which a rank loses the least share, as SAES-SVD reckons it (section 4.2): to first order, which is with
        the leading singular vectors at strength 0."""
        whole, moved = times_root(dense, self), times_root(change, self)
        left = leading_left_vectors(dense, computed_rank(rank, dense, xp), self, xp)
        right = xp.linalg.qr(whole.T @ left)[0]  # orthonormal even where a column vanishes
        used = xp.arange(left.shape[1]) < rank
        left, right = left * used, right * used

        def beyond(matrix: Array) -> Array:
            matrix = matrix - left @ (left.T @ matrix)
            return matrix - matrix @ right @ right.T

        rest, lost = beyond(whole), beyond(moved)
        tail = [float((one * other).sum()) for one, other in ((rest, rest), (rest, lost), (lost, lost))]
        full = [float((one * other).sum()) for one, other in ((whole, whole), (whole, moved), (moved, moved))]
        return _least_share(tail, full, *STRENGTHS)


def _least_share(tail: list[float], full: list[float], low: float, high: float) -> float:
    """Where ``(a + 2 b s + c s^2) / (A + 2 B s + C s^2)`` is least between two numbers; the lower one if it is alike everywhere."""
    (a, b, c), (aa, bb, cc) = tail, full
    turns = np.roots([c * bb - b * cc, c * aa - a * cc, b * aa - a * bb]).real
    candidates = [low, high, *(float(turn) for turn in turns if low < turn < high)]

    def share(s: float) -> float:
        whole = aa + 2 * bb * s + cc * s * s
        return (a + 2 * b * s + c * s * s) / whole if whole > 0 else np.inf

    return min(candidates, key=share)
