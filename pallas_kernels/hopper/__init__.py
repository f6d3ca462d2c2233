"""Products of prompts on Hopper's tensor cores, as Mosaic GPU kernels, for what cuBLAS does not do with a product's results."""

from pallas_kernels.heads import project_heads
from pallas_kernels.hopper import heads, products
from pallas_kernels.products import project
from pallas_kernels.registry import Implementation
from pallas_kernels.target import Target, not_nvidia

NAME = "hopper"


def unavailable(device: Target) -> str | None:
    """Why these kernels can serve no call on a device, or None."""
    if (reason := not_nvidia(device)) is not None:
        return reason
    if device.capability != (9, 0):
        return f"for Hopper's tensor cores (compute capability 9.0), not {device.capability[0]}.{device.capability[1]}"
    return None


def register() -> None:
    """Lets them serve calls that name or prefer them."""
    project.register(Implementation(NAME, products.project, products.refuses, unavailable), on_request=True)
    project_heads.register(Implementation(NAME, heads.project_heads, heads.refuses, unavailable), on_request=True)
