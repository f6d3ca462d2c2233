"""Low-rank layers of prompts and encoders on Hopper, as Mosaic GPU kernels, for what cuBLAS does not do with products."""

from typing import Any

import jax

from pallas_kernels.attention import attend
from pallas_kernels.feed_forward import feed_forward as feed_forward_op
from pallas_kernels.heads import project_heads
from pallas_kernels.hopper import feed_forward, flash, heads, products
from pallas_kernels.products import project, rows
from pallas_kernels.projection import PackedProjection
from pallas_kernels.registry import MOST_KINDS, Implementation
from pallas_kernels.target import Target, not_nvidia

NAME = "hopper"
_LEAST_RANK, _MOST_ROWS = 256, 4096
"""With shorter sums the tensor cores wait for what is done with each. With more rows, cuBLAS's tiles of twice as many are as fast
by themselves, and take less of the power that the whole chip shares. Measured are ranks of 1024 and 1536 on an H200, where a layer
of Llama-2-7B takes 17 % less time at 512 rows and 6 % less at 4096; at 8192 plain JAX was faster (bench/NOTES.md)."""


def unavailable(device: Target) -> str | None:
    """Why these kernels can serve no call on a device, or None."""
    if (reason := not_nvidia(device)) is not None:
        return reason
    if device.capability != (9, 0):
        return f"for Hopper's tensor cores (compute capability 9.0), not {device.capability[0]}.{device.capability[1]}"
    return None


def slower(x: jax.Array, packed: PackedProjection, *rest: Any, **options: Any) -> str | None:
    """Why others are expected to serve a call sooner, or None."""
    if rows(x) > _MOST_ROWS:
        return f"{rows(x)} rows; above {_MOST_ROWS} products of larger tiles are faster"
    narrowest = min(packed.widths)
    return (
        f"ranks down to {narrowest}; below {_LEAST_RANK} others are taken to be faster"
        if narrowest < _LEAST_RANK
        else None
    )


def register() -> None:
    """Lets them serve calls, before those that are registered already."""
    why = {"unavailable": unavailable, "slower": slower, "most_kinds": MOST_KINDS}
    project.register(Implementation(NAME, products.project, products.refuses, **why))
    project_heads.register(Implementation(NAME, heads.project_heads, heads.refuses, **why))
    served = feed_forward.feed_forward, feed_forward.refuses, unavailable
    feed_forward_op.register(Implementation(NAME, *served, slower=feed_forward.slower, most_kinds=MOST_KINDS))
    attend.register(Implementation(NAME, flash.attend, flash.refuses, unavailable))
