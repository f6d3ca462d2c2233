"""What a product kernel computes, as data: which weights, over which part of the input, for which part of the output.

A call computes several members y_i = x[:, x_start : x_start + k] @ w[row_start : row_start + rows].T, each a block of rows of one
weight array. Its programs are numbered through: the first `tiles` of them belong to member 0, the next to member 1, and so on.

    q | k | v, low rank    first factors: one member, all rows of the stacked array
                           second factors: three members, each over its own slice of the latents
    q | k | v, dense       three members, slices of one stacked array
"""

import dataclasses

from pallas_kernels.projection import PackedProjection


@dataclasses.dataclass(frozen=True)
class Member:
    """One block of output rows.

    Attributes:
      weight: number of the weight operand; None where the input itself is the product (a dense member among low-rank ones).
      row_start: its first row there.
      x_start: first column of the input that it reads.
      k: columns that it reads.
      rows: of output.
      bias: number of the bias operand, or None.
    """

    weight: int | None
    row_start: int
    x_start: int
    k: int
    rows: int
    bias: int | None = None


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of a product kernel.

    Attributes:
      rows: output rows of a program.
      k: elements of the contraction axis in a step of its loop.
      warps: of a program.
      stages: steps of the loop in flight; only tensor-core programs have any.
      splits: programs that share a row block, each over its part of the contraction axis.
    """

    rows: int
    k: int
    warps: int
    stages: int = 1
    splits: int = 1


@dataclasses.dataclass(frozen=True)
class ProductPlan:
    """A product kernel without its arrays.

    Attributes:
      members: in the order of their programs.
      batch: rows of x.
      weights, biases: number of operands of each kind.
      eps: of the norm over x; None without one.
      gate: activation of the first member, which then multiplies the second's rows.
      residual: the output is added to one.
    """

    members: tuple[Member, ...]
    batch: int
    weights: int
    biases: int
    eps: float | None = None
    gate: str | None = None
    residual: bool = False

    @property
    def splittable(self) -> bool:
        """Whether partial sums can be added up outside: nothing but one product is done."""
        return len(self.members) == 1 and not (self.biases or self.gate or self.residual or self.eps is not None)

    @property
    def outputs(self) -> tuple[Member, ...]:
        """The members whose rows the outputs have; a gate and what it gates make one."""
        return self.members[:1] if self.gate else self.members

    def tiles(self, rows: int) -> tuple[int, ...]:
        """Programs of each output."""
        return tuple(-(-m.rows // rows) for m in self.outputs)


def latent_members(packed: PackedProjection) -> tuple[Member, ...]:
    """The one member of the first product where any member is low rank: all stacked rows, without bias."""
    rows, d_in = packed.first.shape
    return (Member(0, 0, 0, d_in, rows),)


def second_members(packed: PackedProjection) -> tuple[Member, ...]:
    """The members of the second product, over the latents; weights and biases numbered without the absent ones."""
    members = []
    weights = biases = 0
    for up, bias, start, width in zip(packed.ups, packed.biases, packed.starts, packed.widths, strict=True):
        rows = width if up is None else up.shape[0]
        members.append(Member(None if up is None else weights, 0, start, width, rows, None if bias is None else biases))
        weights += up is not None
        biases += bias is not None
    return tuple(members)


def dense_members(packed: PackedProjection) -> tuple[Member, ...]:
    """The members where all are dense: row blocks of the stacked array."""
    d_in = packed.first.shape[1]
    members = []
    biases = 0
    for bias, start, width in zip(packed.biases, packed.starts, packed.widths, strict=True):
        members.append(Member(0, start, 0, d_in, width, None if bias is None else biases))
        biases += bias is not None
    return tuple(members)
