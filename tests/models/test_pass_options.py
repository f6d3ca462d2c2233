"""How models whose layers differ are compiled."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from flashsvd_jax.models.pass_options import pass_options
from pallas_kernels import MOST_KINDS, Target, assume_target, layer_kinds
from pallas_kernels.target import H200


def layers(*ranks: int) -> list[dict[str, jax.ShapeDtypeStruct]]:
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.bfloat16)  # noqa: E731
    return [{"down": shape(rank, 64), "up": shape(64, rank)} for rank in ranks]


def test_kinds_are_counted_by_shapes() -> None:
    assert [layer_kinds(layers(*ranks)) for ranks in ((8,), (8, 8), (8, 16, 8), (8, 16, 24))] == [1, 1, 2, 3]


@pytest.mark.parametrize("device", [Target("cpu"), dataclasses.replace(H200, interpret=True)])
def test_options_are_for_gpus_alone(device: Target) -> None:
    with assume_target(device):
        assert pass_options(layers(*range(8, 80, 8))) is None


def test_many_kinds_leave_products_to_a_library() -> None:
    few, many = (layers(*range(8, 8 * n + 1, 8)) for n in (MOST_KINDS, MOST_KINDS + 1))
    with assume_target(H200):
        alone = (pass_options(many) or {}).items() - (pass_options(few) or {}).items()
    assert dict(alone) == {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}
