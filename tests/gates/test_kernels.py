"""Every kernel of the package, lowered and compiled for an H200 at the shapes of `kernel_calls`."""

import pytest
from cuda_compile import compile_for_h200, lower_for_cuda
from kernel_calls import KERNEL_CALLS, KernelCall

from pallas_kernels import ops

calls = pytest.mark.parametrize("call", KERNEL_CALLS, ids=[call.label for call in KERNEL_CALLS])


COMPILED_ELSEWHERE = ("xla", "cudnn")  # by XLA alone, and by a library that needs the GPU


def test_every_kernel_is_listed() -> None:
    names = {(op.name, name) for op in ops().values() for name in op.names if not name.startswith(COMPILED_ELSEWHERE)}
    assert names - {(call.op, call.implementation) for call in KERNEL_CALLS} == set()


@calls
def test_it_lowers_for_cuda(call: KernelCall) -> None:
    text = lower_for_cuda(call.function(), call.args, dict(call.arrays)).as_text()
    assert call.implementation.startswith("xla") or "custom_call" in text


@calls
def test_it_compiles_within_limits(call: KernelCall) -> None:
    compiled = compile_for_h200(call.function(), call.args, dict(call.arrays))
    assert compiled.resources
    for name, used in compiled.resources.items():
        assert (used.spill_stores, used.spill_loads) == (0, 0), name
        assert used.registers <= call.max_registers, name
        assert not used.warnings, name  # of wgmma that are kept apart, for one
        assert 0 < used.code_bytes <= call.max_code, name
    for kernel in compiled.kernels:
        assert kernel.shared_memory <= call.max_shared_memory, kernel.name
