"""What a prompt's steps compile: kernels for the layers' shape where they have one, and few where every layer has its own."""

import pytest
from cuda_compile import compile_lowered_by
from prompt_steps import lower_prompt

from pallas_kernels import MOST_KINDS

LAYERS, END = 1, 2
"""Of a prompt's steps those that take longest, the first run of layers and what stands behind the last."""


@pytest.mark.parametrize("ranks", ["uniform", "mixed"])
def test_kernels_are_compiled_for_few_shapes(ranks: str) -> None:
    compiled = compile_lowered_by(lower_prompt, ranks, MOST_KINDS + 1, 512, LAYERS)
    calls = [thunk for thunk in compiled.walk() if thunk.kernel is not None or thunk.kind == "kCublasLtMatmul"]
    assert len(calls) > 10 * MOST_KINDS
    products = {name for name in compiled.ptx if name.startswith(("gemm_fusion", "project_gated", "project_heads"))}
    assert products if ranks == "uniform" else not products


@pytest.mark.parametrize("step", [LAYERS, END])
def test_the_host_waits_for_nothing(step: int) -> None:
    compiled = compile_lowered_by(lower_prompt, "uniform", 1, 512, step)
    assert compiled.kernels
    assert not [thunk for thunk in compiled.walk() if thunk.kind == "kConditional"]


@pytest.mark.parametrize("tokens", [512, 8192])
def test_products_are_a_librarys_which_adds_to_them_what_is_added(tokens: int) -> None:
    compiled = compile_lowered_by(lower_prompt, "uniform", 2, tokens, LAYERS)
    assert "kCublasLtMatmul" in {thunk.kind for thunk in compiled.walk()}
    names = {kernel.name for kernel in compiled.kernels}
    assert not [name for name in names if name.startswith(("gemm_fusion", "loop_add", "wrapped_add"))]
    assert not [name for name in names if "reduce" in name and "loop" in name]  # parts of sums, added apart
