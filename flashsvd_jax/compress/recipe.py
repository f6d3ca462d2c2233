"""How a model is compressed: the choices of the caller, checked, and as a sentence for the record."""

import dataclasses
import math
from collections.abc import Mapping

from flashsvd_jax.compress.allocation import ALLOCATIONS
from flashsvd_jax.compress.budget import Target
from flashsvd_jax.compress.methods import method_named
from flashsvd_jax.errors import RequestError


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A method and its options.

    Attributes:
      method: a name in `METHODS`.
      target: how large the result is to be; a number is the share of the layers' parameters that is kept. None with ``ranks``.
      alloc: "uniform", the same ratio at every projection; "greedy", by gain for cost over all of them, a gain
        being a share of a projection's own loss; "fisher", the same with gains scaled to the model's loss; "v2", by theoretical
        loss within each kind, as SVD-LLM v2; "sensitivity", by what each does to the model's loss, as ASVD; "file" with ``ranks``.
      multiple: of which ranks are, where a projection is not too small for it. Targets in bytes and milliseconds also pass over
        ranks that kernels would pad.
      alpha: ASVD's exponent of the inputs' mean magnitude.
      update: whether second factors are fitted again, to inputs as the compressed layers before have them.
      ranks: by site, where they are given; others stay dense.

    Raises:
      RequestError: one of them is unknown or out of range, or two contradict each other.
    """

    method: str
    target: Target | float | None = None
    alloc: str = "uniform"
    multiple: int = 1
    alpha: float = 0.5
    update: bool = False
    ranks: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        method = method_named(self.method)
        if isinstance(self.target, int | float):
            object.__setattr__(self, "target", Target("ratio", self.target))
        if (self.target is None) == (self.ranks is None):
            raise RequestError("give either a target, such as a ratio, or ranks")
        if self.multiple < 1:
            raise RequestError(f"ranks can be multiples of 1 or more, not of {self.multiple}")
        if self.alloc not in ALLOCATIONS:
            raise RequestError(f"alloc {self.alloc!r} is not one of {', '.join(ALLOCATIONS)}")
        if (self.alloc == "file") != (self.ranks is not None):
            raise RequestError("alloc is 'file' where ranks are given, and nowhere else")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise RequestError(f"alpha must be above 0, not {self.alpha}")
        if self.update and method.sequential:
            raise RequestError(
                f"method {self.method} fits both factors to the inputs that an update would fit the second ones to; for first"
                " factors by the dense model's inputs and an update after, as SVD-LLM published it, choose method drone"
            )

    @property
    def reads_text(self) -> bool:
        """Whether statistics of a text are needed."""
        return bool(self.why_text)

    @property
    def why_text(self) -> str:
        """What needs a text; empty where nothing does."""
        if method_named(self.method).needs is not None:
            return f"method {self.method}"
        if self.alloc in ("fisher", "sensitivity"):
            return f"alloc {self.alloc}"
        return "an update" if self.update else ""

    def __str__(self) -> str:
        alpha = f", alpha {self.alpha:g}" * (self.method == "asvd")
        update = "; second factors fitted again to inputs of compressed layers" * self.update
        if self.ranks is not None:
            return f"compressed by {self.method}{alpha} with given ranks{update}"
        rounded = f" in multiples of {self.multiple}" * (self.multiple > 1)
        return f"compressed by {self.method}{alpha} to {self.target}, {self.alloc} ranks{rounded}{update}"
