"""How a model is compressed: the choices of the caller, checked, and as a sentence for the record."""

import dataclasses
import math

from flashsvd_jax.compress.allocation import ALLOCATIONS, check_budget
from flashsvd_jax.compress.methods import method_named
from flashsvd_jax.errors import RequestError


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A method and its options.

    Attributes:
      method: a name in `METHODS`.
      ratio: share of the layers' parameters that is kept, between 0 and 1.
      alloc: "uniform", the ratio at every projection, or "greedy", by gain a parameter over all of them.
      multiple: of which ranks are, where a projection is not too small for it.
      alpha: ASVD's exponent of the inputs' mean magnitude.

    Raises:
      RequestError: one of them is unknown or out of range.
    """

    method: str
    ratio: float
    alloc: str = "uniform"
    multiple: int = 1
    alpha: float = 0.5

    def __post_init__(self) -> None:
        method_named(self.method)
        check_budget(self.ratio, self.multiple)
        if self.alloc not in ALLOCATIONS:
            raise RequestError(f"alloc {self.alloc!r} is not one of {', '.join(ALLOCATIONS)}")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise RequestError(f"alpha must be above 0, not {self.alpha}")

    def __str__(self) -> str:
        rounded = f" in multiples of {self.multiple}" * (self.multiple > 1)
        alpha = f", alpha {self.alpha:g}" * (self.method == "asvd")
        return f"compressed by {self.method}{alpha} to {self.ratio:g} of the layers' parameters, {self.alloc} ranks{rounded}"
