"""Kernels that are not for Hopper alone, compiled for GPUs of other generations, by the cores and the memory that each has."""

import pytest
from cuda_compile import compile_for, lower_for_cuda
from kernel_calls import KERNEL_CALLS

from pallas_kernels.target import Target
from pallas_kernels.triton.call import BLACKWELL

DEVICES = (
    Target("cuda", "NVIDIA A100", (8, 0), 108),
    Target("cuda", "NVIDIA GeForce RTX 4090", (8, 9), 128),
    Target("cuda", "NVIDIA B200", (10, 0), 148),
    Target("cuda", "NVIDIA RTX PRO 6000", (12, 0), 188),
    Target("cuda", "NVIDIA GB10", (12, 1), 48),
)
LABELS = ("project-gate-up-1", "project-gate-up-32", "attend-gqa-8", "flash-8b-after-others", "stream-32", "add-norm")


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.kind)
def test_a_kernel_compiles_for_it(device: Target, label: str) -> None:
    (call,) = (call for call in KERNEL_CALLS if call.label == label)
    compiled = compile_for(device, lower_for_cuda, call.function(), call.args, dict(call.arrays))
    major, minor = device.capability
    assert all(f".target sm_{major}{minor}" in ptx for ptx in compiled.ptx.values())
    for name, used in compiled.resources.items():
        assert (used.spill_stores, used.spill_loads) == (0, 0), name
    for kernel in compiled.kernels:
        assert kernel.shared_memory <= device.shared_memory, kernel.name


def test_every_generation_that_is_served_beyond_hopper_is_compiled_for() -> None:
    assert set(BLACKWELL) <= {device.capability for device in DEVICES}
