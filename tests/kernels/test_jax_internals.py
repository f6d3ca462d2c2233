"""What the persistent kernel uses of JAX beyond its public interface: when a new version changes it, this says what and where."""

import inspect
from typing import Any

import jax
import pytest
from jax._src.lib.mlir.dialects import arith, scf
from jax._src.pallas.mosaic_gpu import primitives
from jax.experimental.mosaic.gpu import FragmentedArray, launch_context, utils
from jax.experimental.pallas import mosaic_gpu as plgpu

USED: list[tuple[str, Any, str, set[str]]] = [
    ("code.emitted", plgpu, "inline_mgpu", {"arg_types", "return_type"}),
    ("code.ptx", utils, "inline_ptx", {"ptx", "result_types", "has_side_effects"}),
    ("code.meet", utils, "warpgroup_barrier", set()),
    ("code.when", utils, "when", set()),
    ("code.address", utils, "memref_ptr", set()),
    ("code.partner", utils, "shfl_bfly", set()),
    ("code.integer", utils, "c", set()),
    ("code.splat", FragmentedArray, "splat", {"value", "shape", "is_signed"}),
    ("code.as_products", plgpu.Layout.WGMMA, "to_mgpu", set()),
    ("attend, outputs", FragmentedArray, "foreach", {"fn", "create_array"}),
    ("code.repeat", scf, "ForOp", set()),
    ("words.until_written", scf, "WhileOp", set()),
    ("code", arith, "cmpi", set()),
    (
        "copies.write_tensor_maps",
        launch_context.LaunchContext,
        "_get_tma_desc",
        {"gmem_ref", "gmem_transform", "gmem_peer_id", "transformed_slice_shape", "swizzle", "reduction_op"},
    ),
    ("kernel", plgpu, "kernel", {"out_type", "grid", "num_threads", "thread_name", "scratch_types", "compiler_params"}),
    ("multiplying", plgpu, "wgmma", set()),
    ("multiplying", plgpu, "wgmma_wait", set()),
    ("multiplying", plgpu, "ACC", set()),
    ("multiplying", plgpu, "layout_cast", set()),
]


@pytest.mark.parametrize(("where", "owner", "name", "parameters"), USED, ids=[f"{u[2]}" for u in USED])
def test_it_is_still_there(where: str, owner: Any, name: str, parameters: set[str]) -> None:
    said = f"pallas_kernels/persistent/{where} needs {getattr(owner, '__name__', owner)}.{name}"
    assert hasattr(owner, name), f"{said}, which jax {jax.__version__} does not have"
    if parameters:
        missing = parameters - inspect.signature(getattr(owner, name)).parameters.keys()
        assert not missing, f"{said} with {', '.join(sorted(missing))}, which jax {jax.__version__} does not take"


def test_code_that_is_inlined_counts_as_writing_what_it_is_given() -> None:
    """That JAX knows the cache as written rests on it: the kernel writes it by its address alone."""
    source = inspect.getsource(primitives._inline_mgpu_abstract_eval)
    assert "WriteEffect" in source, f"jax {jax.__version__} no longer takes inlined code to write its references"
