"""How factors are trained: the choices of the caller, checked, and as a sentence for the record."""

import dataclasses
import math

from flashsvd_jax.checkpoint.manifest import DTYPES
from flashsvd_jax.errors import RequestError


@dataclasses.dataclass(frozen=True)
class Settings:
    """Choices; lengths are in tokens.

    Attributes:
      steps: of the optimizer, Adam, gradients cut to norm 1.
      batch: windows a step.
      length: tokens of a window that are read.
      lr: highest learning rate; it rises to that over the first twentieth of the steps, then falls as a cosine to 0.
      lora: rank of an adapter on each factor that is trained in its place and added to it at the end; None trains the factors.
      dtype: of weights and activations in the forward pass; what is trained is float32 at any rate.
      seed: orders the windows, and draws adapters.
      save_every: steps from one kept state to the next, where they are kept.

    Raises:
      RequestError: one of them is out of range.
    """

    steps: int = 1000
    batch: int = 8
    length: int = 512
    lr: float = 1e-4
    lora: int | None = None
    dtype: str = "bfloat16"
    seed: int = 0
    save_every: int = 100

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "lora", "save_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RequestError(f"{name} must be at least 1, not {value}")
        if not 0 <= self.seed < 2**63:
            raise RequestError(f"seed must be from 0 to 2**63 - 1, not {self.seed}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise RequestError(f"lr must be above 0, not {self.lr}")
        if self.dtype not in DTYPES:
            raise RequestError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")

    def __str__(self) -> str:
        what = "factors" if self.lora is None else f"adapters of rank {self.lora} on the factors, added to them,"
        return (
            f"{what} trained for {self.steps} steps of {self.batch} windows of {self.length} tokens, learning rate {self.lr:g},"
            f" in {self.dtype}, seed {self.seed}"
        )
