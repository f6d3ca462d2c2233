"""What launches of the persistent kernel that follow each other hand on."""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kept:
    """Of steps with the same operands, `pallas_kernels.Carried.own`.

    Attributes:
      words: int32 [`Plan.kept_integers`], zeros at first.
      maps, addresses: of the operands, see `tensor_maps.describe`.
    """

    words: jax.Array
    maps: jax.Array
    addresses: jax.Array
