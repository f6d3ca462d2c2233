"""Which block sizes a product kernel gets: what was measured on this device if it was, else a rule.

Measured choices are data, `tuned/<device>.json`: rules in order, the first that fits a product serves it. Each bound is
[lowest, highest], null for no bound.
"""

import dataclasses
import functools
from typing import Any

from pallas_kernels.rounding import power_of_two_within
from pallas_kernels.target import Target
from pallas_kernels.triton.call import padded_batch
from pallas_kernels.triton.plan import Blocks, ProductPlan
from pallas_kernels.tuned import table

MATVEC_BATCH = 2
"""Up to this many rows multiply-and-add keeps up with memory; beyond, tensor cores do: 4.5 ms a token of Llama-2-7B at 0.5 with
four rows by the one, 3.3 with eight by the other (H200)."""


def product_blocks(plan: ProductPlan, device: Target, itemsize: int = 2) -> Blocks:
    """Block sizes for a product on a device, of elements of so many bytes."""
    facts = {
        "batch": plan.batch,
        "rows": sum(m.rows for m in plan.members),
        "k": max(m.k for m in plan.members),
        "tiles_together": 2 if plan.gate else 1,
        "splittable": int(plan.splittable),
    }
    for rule in _tuned(device.kind):
        if all(_within(facts[name], bounds) for name, bounds in rule["for"].items()):
            return _fitting(Blocks(**rule["blocks"]), plan, device, itemsize)
    rule = _matvec_rule if plan.batch <= MATVEC_BATCH else _matmul_rule
    return _fitting(rule(facts["rows"], facts["k"], plan, device.cores), plan, device, itemsize)


def _fitting(blocks: Blocks, plan: ProductPlan, device: Target, itemsize: int) -> Blocks:
    """The same with fewer tiles in flight where shared memory is too small for them."""
    if plan.batch <= MATVEC_BATCH:
        return blocks
    stage = blocks.k * (blocks.rows + padded_batch(plan.batch)) * itemsize
    return dataclasses.replace(blocks, stages=max(1, min(blocks.stages, device.shared_memory // stage)))


def _matvec_rule(rows: int, k: int, plan: ProductPlan, cores: int) -> Blocks:
    """A step 256 elements a warp wide; long steps where a weight has few rows, so that enough of it is in flight at once."""
    few = k >= 4096 and rows <= 16 * cores
    warps = 8 if few else 4 if k > 512 else 2 if k > 256 else 1
    step = 256 * warps
    if step < k <= 2 * step:
        step *= 2
    return Blocks(rows=2 if few or plan.batch > 2 else 4, k=step, warps=warps)


def _matmul_rule(rows: int, k: int, plan: ProductPlan, cores: int) -> Blocks:
    """64 rows by 128 where that gives every core work, by splitting the contraction axis if need be; else fewer rows."""
    step = max(16, power_of_two_within(k))
    if plan.splittable and k >= 2048 and rows <= 16 * cores:
        splits = power_of_two_within(max(1, cores // -(-rows // 64)))
        return Blocks(rows=64, k=128, warps=4, stages=5, splits=min(splits, k // 512))
    if rows >= 64 * cores:
        return Blocks(rows=64, k=min(128, step), warps=4, stages=4)
    return Blocks(rows=32 if rows >= 32 * cores else 16, k=min(256, step), warps=2, stages=4)


def _within(value: int, bounds: list[int | None]) -> bool:
    low, high = bounds
    return (low is None or value >= low) and (high is None or value <= high)


@functools.cache
def _tuned(kind: str) -> list[dict[str, Any]]:
    return table("pallas_kernels.triton", kind) or []
