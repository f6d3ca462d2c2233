"""Two warpgroups that multiply one after the other, so that one computes meanwhile: else both would do the same at once."""

import dataclasses
from typing import Any

from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


@dataclasses.dataclass(frozen=True)
class Turns:
    """``barriers`` [2], the turns of each, or None where nobody waits; and which of the two this ``warpgroup`` is."""

    barriers: Any
    warpgroup: Any

    def begin(self, of: int | None = None) -> None:
        """Waits for the turn, or does so if it is that warpgroup."""
        if self.barriers is None:
            return
        if of is None:
            plgpu.barrier_wait(self.barriers.at[self.warpgroup])
        else:
            pl.when(self.warpgroup == of)(lambda: plgpu.barrier_wait(self.barriers.at[of]))

    def end(self, of: int | None = None) -> None:
        """Gives the turn to the other, or does so if it is that warpgroup."""
        if self.barriers is not None:
            mine = None if of is None else self.warpgroup == of
            plgpu.barrier_arrive(self.barriers.at[1 - self.warpgroup], predicate=mine)
