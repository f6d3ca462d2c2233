"""The gates see what they are for: toy kernels with known faults, lowered and compiled for an H200."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from cuda_compile import CompilationError, compile_for_h200, lower_for_cuda
from toy_kernels import double, double_in_a_loop, multiply, search_in_a_loop

COUNT = jax.ShapeDtypeStruct((), jnp.int32)


def square(size: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((size, size), jnp.bfloat16)


def test_a_pallas_kernel_is_lowered_for_cuda_here() -> None:
    text = lower_for_cuda(double, square(64)).as_text()
    assert "__gpu$xla.gpu.triton" in text and "double" in text


def test_a_tile_that_is_no_power_of_two_is_not_lowered() -> None:
    with pytest.raises(ValueError, match="power of 2"):
        lower_for_cuda(double, square(96))


def test_the_process_of_the_tests_keeps_its_own_jax() -> None:
    compile_for_h200(double, square(64))
    assert jax.default_backend() == "cpu"


def test_launches_and_resources_of_a_kernel() -> None:
    compiled = compile_for_h200(double, square(64))
    (kernel,) = compiled.kernels
    assert (kernel.name, kernel.grid, kernel.threads, kernel.shared_memory) == ("double", (16, 1, 1), (64, 1, 1), 0)
    assert 0 < compiled.resources["double"].registers <= 32
    assert compiled.resources["double"].spill_stores == 0
    assert ".entry double(" in compiled.ptx["double"]
    assert (compiled.argument_bytes, compiled.alias_bytes, compiled.temp_bytes) == (8192, 0, 0)


def test_a_donated_argument_is_taken_over() -> None:
    assert compile_for_h200(double, square(64), donate_argnums=0).alias_bytes == 8192


def test_spills_are_seen() -> None:
    """128 x 128 sums in float32 over one warp are 512 a thread, twice what a thread can hold."""
    resources = compile_for_h200(partial(multiply, tile=128, warps=1), square(256), square(256)).resources["multiply"]
    assert resources.registers == 255
    assert resources.spill_stores > 0 and resources.spill_loads > 0


def test_too_much_shared_memory_is_an_error() -> None:
    with pytest.raises(CompilationError, match=r"[Ss]hared memory"):
        compile_for_h200(partial(multiply, tile=256, warps=8), square(512), square(512))


def test_kernels_in_a_loop_become_one_command_buffer() -> None:
    (turn,) = compile_for_h200(double_in_a_loop, square(64), COUNT).loop_body()
    assert turn.kind == "kCommandBuffer"
    assert [thunk.kernel.name.split("_")[0] for thunk in turn.parts[""] if thunk.kernel].count("double") == 6


def test_what_no_command_buffer_takes_is_seen() -> None:
    body = compile_for_h200(search_in_a_loop, square(64), COUNT).loop_body()
    assert len(body) > 1 and "kWhile" in [thunk.kind for thunk in body]


def test_an_inner_function_cannot_be_sent() -> None:
    with pytest.raises(TypeError, match="importable modules"):
        compile_for_h200(lambda x: x, square(64))
