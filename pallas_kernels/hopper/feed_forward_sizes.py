"""Sizes of the kernel of low-rank feed-forward layers: what a program holds, and what fits into it."""

import dataclasses

import jax

from pallas_kernels.hopper.blocks import BLOCK
from pallas_kernels.hopper.ring import HALF, MULTIPLIERS, PEERS, ROWS
from pallas_kernels.products import rows
from pallas_kernels.projection import PackedProjection
from pallas_kernels.target import Target, target

MOST_SUMS = 5
"""Blocks of latents whose sums a warpgroup has registers for."""
STAGES = (16, 12, 10, 8, 6)
"""Places that the ring may have; with other numbers the compiler spills."""
IN_TURNS = True
"""Whether warpgroups multiply in turns where the ring is long enough."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a call.

    Attributes:
      device: that it is for.
      tokens, width, inner: rows and columns of x, and columns between the pairs.
      members: of up, where each begins among the latents and how many blocks of them it has.
      sums: blocks of latents behind the activation.
      biased: of each member of up and of down, whether it has a bias.
      activation: its name.
      has_residual: whether something is added to the output.
      peers: programs that copy factors together.
    """

    device: Target
    tokens: int
    width: int
    inner: int
    members: tuple[tuple[int, int], ...]
    sums: int
    biased: tuple[bool, ...]
    activation: str
    has_residual: bool
    peers: int

    @property
    def counts(self) -> tuple[int, ...]:
        """Blocks of latents before the activation, of each member."""
        return tuple(count for _, count in self.members)

    @property
    def latents(self) -> int:
        """All of these."""
        return sum(self.counts)

    @property
    def held(self) -> int:
        """Blocks that a program holds for its tokens."""
        return max(self.latents, self.sums)

    @property
    def stages(self) -> int:
        """Of the ring."""
        size = self.device.shared_memory - 2 * self.held * ROWS * BLOCK - 2 * MULTIPLIERS * HALF * BLOCK - 1024
        return next((n for n in STAGES if n <= size // (2 * BLOCK * BLOCK)), 0)

    @property
    def in_turns(self) -> bool:
        """Whether warpgroups multiply in turns. Then one may be a turn ahead, and blocks are held until the other has read them."""
        return IN_TURNS and self.stages >= self.latents + self.sums + 2

    @property
    def tiles(self) -> int:
        """Of all peers together."""
        return self.tokens // (ROWS * self.peers)

    @property
    def steps(self) -> int:
        """Of the first and the last part, as x has blocks of columns."""
        return self.width // BLOCK


def sizes_of(x: jax.Array, up: PackedProjection, down: PackedProjection, activation: str, has_residual: bool) -> Sizes:
    members = tuple((start, -(-width // BLOCK)) for start, width in zip(up.starts, up.widths, strict=True))
    biased = tuple(bias is not None for bias in (*up.biases, *down.biases))
    alone = rows(x) % (PEERS * ROWS) or target().interpret  # see `ring.tiling`
    return Sizes(
        target(), rows(x), x.shape[-1], up.d_outs[0], members, -(-down.widths[0] // BLOCK), biased, activation, has_residual,
        1 if alone else PEERS,
    )  # fmt: skip
