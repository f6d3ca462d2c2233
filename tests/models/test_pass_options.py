"""How models whose layers differ are compiled."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from flashsvd_jax.models.pass_options import pass_options, run_options
from pallas_kernels import MOST_KINDS, Target, assume_target, layer_kinds
from pallas_kernels.target import H200


def layers(*ranks: int) -> list[dict[str, jax.ShapeDtypeStruct]]:
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.bfloat16)  # noqa: E731
    return [{"down": shape(rank, 64), "up": shape(64, rank)} for rank in ranks]


def test_kinds_are_counted_by_shapes() -> None:
    assert [layer_kinds(layers(*ranks)) for ranks in ((8,), (8, 8), (8, 16, 8), (8, 16, 24))] == [1, 1, 2, 3]


@pytest.mark.parametrize("device", [Target("cpu"), dataclasses.replace(H200, interpret=True), H200])
def test_many_kinds_leave_products_to_a_library(device: Target) -> None:
    few, many = (layers(*range(8, 8 * n + 1, 8)) for n in (MOST_KINDS, MOST_KINDS + 1))
    with assume_target(device):
        assert pass_options(few) is None
        assert (pass_options(many) is not None) == (device == H200)


def test_runs_of_layers_have_no_graph_on_a_gpu() -> None:
    few, many = (layers(*range(8, 8 * n + 1, 8)) for n in (MOST_KINDS, MOST_KINDS + 1))
    with assume_target(Target("cpu")):
        assert run_options(few) is None
    with assume_target(H200):
        (graph,) = (run_options(few) or {}).items()
        assert run_options(many) == dict([graph]) | (pass_options(many) or {})
