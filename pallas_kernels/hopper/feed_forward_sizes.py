"""Sizes of the kernel of low-rank feed-forward layers: what a program holds, and what fits into it."""

import dataclasses

import jax

from pallas_kernels.hopper.blocks import BLOCK
from pallas_kernels.hopper.ring import HALF, MULTIPLIERS, ROWS, peers_of
from pallas_kernels.products import rows
from pallas_kernels.projection import PackedProjection
from pallas_kernels.target import Target, target

MOST_SUMS = 5
"""Blocks of latents whose sums a warpgroup has registers for."""
STAGES = (16, 12, 10, 8, 6)
"""Places that the ring may have; with other numbers the compiler spills."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a call.

    Attributes:
      device: that it is for.
      tokens, width, inner: rows and columns of x, and columns between the pairs.
      latents: before the activation, where they begin and how many blocks there are of each kind.
      members: of up, the kind of latents that each lifts; a gate and what it gates may lift the same.
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
    latents: tuple[tuple[int, int], ...]
    members: tuple[int, ...]
    sums: int
    biased: tuple[bool, ...]
    activation: str
    has_residual: bool
    peers: int

    @property
    def counts(self) -> tuple[int, ...]:
        """Blocks of latents of each kind."""
        return tuple(count for _, count in self.latents)

    def place(self, kind: int) -> int:
        """Of the first of them, where latents are held."""
        return sum(self.counts[:kind])

    @property
    def held(self) -> int:
        """Blocks that a program holds for its tokens."""
        return max(sum(self.counts), self.sums)

    @property
    def stages(self) -> int:
        """Of the ring; none if a program would wait for good.

        Blocks of x stay, and so does the last that is multiplied with them, until the first product of the next step has begun:
        by then there are the next blocks of x too, and one that is multiplied with these.
        """
        size = self.device.shared_memory - 2 * self.held * ROWS * BLOCK - 2 * MULTIPLIERS * HALF * BLOCK - 1024
        found = next((n for n in STAGES if n <= size // (2 * BLOCK * BLOCK)), 0)
        return found if found >= MULTIPLIERS + max(self.counts) + MULTIPLIERS + 1 else 0

    @property
    def tiles(self) -> int:
        """Of all peers together."""
        return self.tokens // (ROWS * self.peers)

    @property
    def steps(self) -> int:
        """Of the first and the last part, as x has blocks of columns."""
        return self.width // BLOCK


def sizes_of(x: jax.Array, up: PackedProjection, down: PackedProjection, activation: str, has_residual: bool) -> Sizes:
    """Those of a call of `feed_forward`."""
    kinds = [*zip(up.starts, up.widths, strict=True)]
    latents = [*dict.fromkeys(kinds)]
    blocks = tuple((start, -(-width // BLOCK)) for start, width in latents)
    members = tuple(latents.index(kind) for kind in kinds)
    biased = tuple(bias is not None for bias in (*up.biases, *down.biases))
    return Sizes(
        target(), rows(x), x.shape[-1], up.d_outs[0], blocks, members, -(-down.widths[0] // BLOCK), biased, activation,
        has_residual, peers_of(target(), rows(x)),
    )  # fmt: skip
