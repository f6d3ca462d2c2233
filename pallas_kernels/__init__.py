"""Operations of low-rank inference: what they compute, and the ways to compute them. Knows nothing of models."""

from pallas_kernels.attention import attend
from pallas_kernels.projection import PackedProjection, Projection, hardware_rank, pack, project
from pallas_kernels.registry import Implementation, Op, ops

__flashsvd__ = True  # marks this project's own packages; see flashsvd_jax._siblings

__all__ = [
    "Implementation",
    "Op",
    "PackedProjection",
    "Projection",
    "attend",
    "hardware_rank",
    "ops",
    "pack",
    "project",
]
