"""The op `segment`: all that a layer does between its attention and the next layer's, so that one kernel may do it."""

import dataclasses
from collections.abc import Callable

import jax

from pallas_kernels.norm import Norm
from pallas_kernels.products import project, project_reference
from pallas_kernels.projection import PackedProjection
from pallas_kernels.registry import Implementation, Op


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Between:
    """What stands between two attentions.

    Attributes:
      o: output projection of the first.
      mlp_norm: before gate and up.
      gate_up: two members.
      down: of the MLP.
      next_norm, following: the norm and the projections that begin the next layer; None after the last.
      gate: name of the activation, as for `project`.
    """

    o: PackedProjection
    mlp_norm: Norm
    gate_up: PackedProjection
    down: PackedProjection
    next_norm: Norm | None
    following: PackedProjection | None
    gate: str = dataclasses.field(metadata={"static": True})


def segment_reference(x: jax.Array, attended: jax.Array, between: Between) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Output projection and gated MLP, each added to the residual stream, then the next projections of the normed stream.

    Args:
      x: the residual stream [..., width].
      attended: [..., heads * head_dim].
      between: the weights.

    Returns:
      The residual stream after the MLP, and one [..., d_out] for each member that follows.
    """
    return _segment(project_reference, x, attended, between)


def _segment(
    product: Callable[..., tuple[jax.Array, ...]], x: jax.Array, attended: jax.Array, between: Between
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    with jax.named_scope("attention_out"):
        (x,) = product(attended, between.o, residual=x)
    with jax.named_scope("mlp"):
        (gated,) = product(x, between.gate_up, norm=between.mlp_norm, gate=between.gate)
        (x,) = product(gated, between.down, residual=x)
    if between.following is None:
        return x, ()
    with jax.named_scope("qkv"):
        return x, product(x, between.following, norm=between.next_norm)


segment = Op("segment", segment_reference)
segment.register(Implementation("products", lambda x, attended, between: _segment(project, x, attended, between)))
