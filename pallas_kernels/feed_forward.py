"""The op `feed_forward`: the two projections around an activation, so that what lies between them may stay on chip."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.activations import ACTIVATIONS, activation_for
from pallas_kernels.products import project, project_reference
from pallas_kernels.projection import PackedProjection
from pallas_kernels.registry import Implementation, Op


def feed_forward_reference(
    x: jax.Array, up: PackedProjection, down: PackedProjection, *, activation: str, residual: jax.Array | None = None
) -> jax.Array:
    """``down(activation(up(x)))``, or ``down(activation(gate(x)) * up(x))``.

    Args:
      x: [..., width].
      up: one member, or two: the gate and what it gates.
      down: one member.
      activation: its name in `ACTIVATIONS`.
      residual: [..., width], added to the output.

    Returns:
      [..., width] in x's dtype.
    """
    if len(up.widths) == 2:
        (inner,) = project_reference(x, up, gate=activation)
    else:
        (inner,) = project_reference(x, up)
        inner = ACTIVATIONS[activation](inner)
    return project_reference(inner, down, residual=residual)[0]


def feed_forward_by(
    product: Callable[..., tuple[jax.Array, ...]], x: jax.Array, up: PackedProjection, down: PackedProjection, *,
    activation: str, residual: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """The same by a product such as `project`."""
    if len(up.widths) == 2:
        (inner,) = product(x, up, gate=activation)
    else:
        (inner,) = product(x, up)
        inner = activation_for(activation, x.dtype)(inner.astype(jnp.float32)).astype(x.dtype)
    return product(inner, down, residual=residual)[0]


feed_forward = Op("feed_forward", feed_forward_reference)
feed_forward.register(Implementation("products", partial(feed_forward_by, project)))
