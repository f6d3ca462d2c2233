"""The op `project` by the matrix-vector kernel, for those who ask for it by name."""

from typing import Any

import jax

from pallas_kernels.jax_triton.matrix_vector import matrix_vector, missing, refusal
from pallas_kernels.products import project, project_reference, rows
from pallas_kernels.projection import PackedProjection
from pallas_kernels.registry import Implementation
from pallas_kernels.target import Target, not_nvidia

NAME = "jax_triton"


def register() -> None:
    """Adds the implementation to `project`, behind the reference: it serves the calls that name or prefer it, no other.

    Raises:
      ValueError: it is registered already.
    """
    project.register(Implementation(NAME, run, refuses, unavailable), on_request=True)


def unavailable(device: Target) -> str | None:
    """Why it cannot run on a device at all."""
    if (reason := not_nvidia(device)) is not None:
        return reason
    if device.interpret:
        return "jax-triton has no interpreter"
    return missing()


def refuses(x: jax.Array, packed: PackedProjection, **options: Any) -> str | None:
    """Why it cannot serve a call."""
    weights = [packed.first, *(up for up in packed.ups if up is not None)]
    reasons = (refusal(rows(x), x.dtype, weight) for weight in weights)
    return next(filter(None, reasons), None)


def run(x: jax.Array, packed: PackedProjection, **options: Any) -> tuple[jax.Array, ...]:
    """As `pallas_kernels.project`: one kernel a weight, norm and epilogues by XLA."""
    return project_reference(x, packed, product=_product, **options)


def _product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [..., i] times weight [o, i]: float32 [..., o]."""
    y = matrix_vector(x.reshape(-1, x.shape[-1]), weight, jax.numpy.dtype("float32"))
    return y.reshape(*x.shape[:-1], -1)
