"""The op `segment`: all that a layer does between its attention and the next layer's, so that one kernel may do it."""

from collections.abc import Callable

import jax

from pallas_kernels.norm import Norm
from pallas_kernels.products import project, project_reference
from pallas_kernels.projection import PackedProjection
from pallas_kernels.registry import Implementation, Op


def segment_reference(
    x: jax.Array,
    attended: jax.Array,
    *,
    o: PackedProjection,
    mlp_norm: Norm,
    gate_up: PackedProjection,
    gate: str,
    down: PackedProjection,
    next_norm: Norm | None = None,
    following: PackedProjection | None = None,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Output projection and gated MLP, each added to the residual stream, then the next projections of the normed stream.

    Args:
      x: the residual stream [..., width].
      attended: [..., heads * head_dim].
      o: output projection of attention.
      mlp_norm: before gate and up.
      gate_up: two members.
      gate: name of the activation, as for `project`.
      down: of the MLP.
      next_norm, following: the norm and the projections that begin the next layer; None after the last.

    Returns:
      The residual stream after the MLP, and one [..., d_out] for each member that follows.
    """
    return _segment(project_reference, x, attended, o, mlp_norm, gate_up, gate, down, next_norm, following)


def _segment(
    product: Callable[..., tuple[jax.Array, ...]],
    x: jax.Array,
    attended: jax.Array,
    o: PackedProjection,
    mlp_norm: Norm,
    gate_up: PackedProjection,
    gate: str,
    down: PackedProjection,
    next_norm: Norm | None = None,
    following: PackedProjection | None = None,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    with jax.named_scope("attention_out"):
        (x,) = product(attended, o, residual=x)
    with jax.named_scope("mlp"):
        (gated,) = product(x, gate_up, norm=mlp_norm, gate=gate)
        (x,) = product(gated, down, residual=x)
    if following is None:
        return x, ()
    with jax.named_scope("qkv"):
        return x, product(x, following, norm=next_norm)


segment = Op("segment", segment_reference)
segment.register(Implementation("products", lambda x, attended, **parts: _segment(project, x, attended, **parts)))
