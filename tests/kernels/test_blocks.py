"""Block sizes of the product kernels: every plan gets some, they fit the kernels' needs, and measured ones are found."""

import itertools

import pytest

from pallas_kernels.target import H200, Target
from pallas_kernels.triton.blocks import MATVEC_BATCH, product_blocks
from pallas_kernels.triton.plan import Member, ProductPlan

A100 = Target("cuda", "NVIDIA A100-SXM4-80GB", (8, 0), 108)
RTX4090 = Target("cuda", "NVIDIA GeForce RTX 4090", (8, 9), 128)


def plan(batch: int, rows: int, k: int, gate: bool = False, eps: float | None = None) -> ProductPlan:
    members = (Member(0, 0, 0, k, rows),) * (2 if gate else 1)
    return ProductPlan(members, batch, 1, 0, eps, "silu" if gate else None)


@pytest.mark.parametrize("device", [H200, A100, RTX4090], ids=lambda d: d.kind)
@pytest.mark.parametrize("batch", [1, 2, 4, 5, 8, 32])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_product_gets_sizes_that_its_kernel_takes(device: Target, batch: int, itemsize: int) -> None:
    for rows, k, gate in itertools.product(
        (8, 96, 1024, 3072, 22016, 151936), (8, 264, 1024, 1536, 4096, 14336), (True, False)
    ):
        blocks = product_blocks(plan(batch, rows, k, gate), device, itemsize)
        assert all(size & (size - 1) == 0 for size in (blocks.rows, blocks.k, blocks.warps))
        if batch <= MATVEC_BATCH:
            # x and weight meet in registers only where a step is as wide as all threads' 16 bytes
            assert blocks.k >= 256 * blocks.warps and blocks.splits == 1
        else:
            tiles = blocks.stages * blocks.k * itemsize * (blocks.rows + max(16, batch))
            assert tiles <= device.shared_memory
            assert min(blocks.rows, blocks.k) >= 8
            assert blocks.splits == 1 or (not gate and blocks.splits * blocks.k <= k)


def test_few_long_rows_are_split_until_the_cores_have_work() -> None:
    assert product_blocks(plan(8, 1536, 11008), H200).splits == 4
    assert product_blocks(plan(8, 1024, 4096), H200).splits == 8
    assert product_blocks(plan(8, 22016, 1536), H200).splits == 1


def test_a_norm_or_an_epilogue_forbids_partial_sums() -> None:
    assert plan(8, 1024, 4096).splittable
    assert not plan(8, 1024, 4096, gate=True).splittable
    assert not plan(8, 1024, 4096, eps=1e-5).splittable


def test_measured_sizes_are_found_on_their_device_and_for_their_shapes() -> None:
    dense_gate = plan(1, 11008, 4096, gate=True, eps=1e-5)
    assert product_blocks(dense_gate, H200).k == 4096
    assert product_blocks(dense_gate, A100).k == 1024
    assert product_blocks(plan(1, 22016, 4096), H200).k == 1024
