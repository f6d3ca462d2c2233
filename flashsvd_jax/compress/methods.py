"""The methods of compression: what each one measures, and which loss it makes of that."""

import dataclasses
from typing import Literal

import numpy as np

from flashsvd_jax.compress.alignment import AlignedLoss
from flashsvd_jax.compress.factors import Loss
from flashsvd_jax.compress.float64 import Array
from flashsvd_jax.errors import RequestError

Statistic = Literal["moment", "magnitude", "fisher"]


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What was measured of one projection; a method needs one of them at most, the shift beside the moment.

    Attributes:
      moment: [d_in, d_in], the sum of ``x^T x`` over the inputs x of all tokens.
      shift: [d_in, d_in], the sum of ``(x0 - x)^T x`` over the same, x0 being a token's input in the dense model.
      magnitude: [d_in], the sum of ``|x|`` over the same.
      fisher: [d_out], the sum over a row of the squared gradients of the model's loss, summed over sequences.
    """

    moment: Array | None = None
    shift: Array | None = None
    magnitude: np.ndarray | None = None
    fisher: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Method:
    """A method.

    Attributes:
      name: as the command line has it.
      description: what it minimises, in a line.
      needs: the statistic that it needs, if any.
      sequential: whether a layer's inputs come from the layers before as they are compressed, not from the dense model.
      shares: whether neighbouring layers have first factors in common, see `shared_bases`.
      aligned: whether outputs are to be near the dense model's, and not just near the weight's for the same inputs.
      strength: how much they are, from 0 to 1; None where each projection chooses it.
    """

    name: str
    description: str
    needs: Statistic | None = None
    sequential: bool = False
    shares: bool = False
    aligned: bool = False
    strength: float | None = None

    def loss(self, statistics: Statistics, alpha: float = 0.5) -> Loss:
        """The loss it minimises; ``alpha`` is ASVD's exponent.

        Raises:
          RequestError: the statistic it needs is missing.
        """
        if self.needs is None:
            return Loss()
        found = getattr(statistics, self.needs)
        if found is None:
            raise RequestError(f"method {self.name} needs the {self.needs} of each projection, which was not measured")
        if self.needs == "fisher":
            return Loss(rows=found)
        if self.needs == "magnitude":
            peak = found.max() or 1.0  # any factor gives the same factors; this one cannot overflow
            return Loss(inputs=(found / peak) ** (2 * alpha))
        if self.aligned and statistics.shift is not None:
            return AlignedLoss(inputs=found, shift=statistics.shift, strength=self.strength)
        return Loss(inputs=found)


METHODS = {
    method.name: method
    for method in (
        Method("svd", "error of the weight itself; no text is read"),
        Method("fwsvd", "rows weighted by the Fisher information of a text (Hsu et al. 2022)", "fisher"),
        Method("asvd", "inputs scaled by their mean magnitude to a power (Yuan et al. 2023)", "magnitude"),
        Method("drone", "error of the outputs, inputs of the dense model (Chen et al. 2021)", "moment"),
        Method(
            "svdllm", "error of the outputs, inputs of the compressed layers before (Wang et al. 2024)", "moment", True
        ),
        Method(
            "saes",
            "as svdllm, outputs between the weight's own and the dense model's, where ranks lose least (Hu et al. 2026)",
            "moment",
            sequential=True,
            aligned=True,
        ),
        Method(
            "aa_svd",
            "error against the dense model's outputs, inputs of the compressed layers before (AA-SVD 2026)",
            "moment",
            sequential=True,
            aligned=True,
            strength=1.0,
        ),
        Method(
            "basis_sharing",
            "error of the outputs, inputs of the dense model, layers sharing first factors (Wang et al. 2024)",
            "moment",
            shares=True,
        ),
    )
}


def method_named(name: str) -> Method:
    """Raises RequestError for a method that is not known."""
    if name not in METHODS:
        raise RequestError(f"no method named {name!r}; known: {', '.join(METHODS)}")
    return METHODS[name]
