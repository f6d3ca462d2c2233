"""The op `feed_forward`: the two projections around an activation, so that what lies between them may stay on chip."""

from functools import partial
from typing import Any

import jax

from pallas_kernels.products import ACTIVATIONS, project, project_reference
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
    return _feed_forward(project_reference, x, up, down, activation=activation, residual=residual)


def _feed_forward(
    product: Any, x: jax.Array, up: PackedProjection, down: PackedProjection, *, activation: str,
    residual: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    if len(up.widths) == 2:
        (inner,) = product(x, up, gate=activation)
    else:
        (inner,) = product(x, up)
        inner = ACTIVATIONS[activation](inner)
    return product(inner, down, residual=residual)[0]


feed_forward = Op("feed_forward", feed_forward_reference)
feed_forward.register(Implementation("products", partial(_feed_forward, project)))
