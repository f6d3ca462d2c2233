"""How models are compiled whose layers differ, or whose passes are to take little memory."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from flashsvd_jax.models.pass_options import FEW_BLOCK_TOKENS, encoder_options, prompt_options
from pallas_kernels import MOST_KINDS, Target, assume_target, layer_kinds
from pallas_kernels.target import H200

LIBRARY, UNTRIED = {"xla_gpu_enable_triton_gemm": False}, {"xla_gpu_autotune_level": 0}


def layers(*ranks: int) -> list[dict[str, jax.ShapeDtypeStruct]]:
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.bfloat16)  # noqa: E731
    return [{"down": shape(rank, 64), "up": shape(64, rank)} for rank in ranks]


FEW, MANY = (layers(*range(8, 8 * n + 1, 8)) for n in (MOST_KINDS, MOST_KINDS + 1))


def test_kinds_are_counted_by_shapes() -> None:
    assert [layer_kinds(layers(*ranks)) for ranks in ((8,), (8, 8), (8, 16, 8), (8, 16, 24))] == [1, 1, 2, 3]


@pytest.mark.parametrize("device", [Target("cpu"), dataclasses.replace(H200, interpret=True)])
def test_options_are_for_gpus_alone(device: Target) -> None:
    with assume_target(device):
        assert prompt_options(MANY) is None and encoder_options(FEW, 16) is None


def test_products_of_prompts_are_a_librarys_and_of_many_kinds_untried() -> None:
    with assume_target(H200):
        assert prompt_options(FEW) == LIBRARY
        assert prompt_options(MANY) == LIBRARY | UNTRIED


@pytest.mark.parametrize("block_tokens", [None, FEW_BLOCK_TOKENS + 1, FEW_BLOCK_TOKENS, 1])
def test_small_blocks_of_encoders_do_without_a_librarys_workspace(block_tokens: int | None) -> None:
    def without_library(options: dict[str, Any] | None) -> bool:
        return "CUBLAS" not in (options or {}).get("xla_gpu_experimental_autotune_backends", "CUBLAS")

    with assume_target(H200):
        small = block_tokens is not None and block_tokens <= FEW_BLOCK_TOKENS
        assert without_library(encoder_options(FEW, block_tokens)) == small
        assert encoder_options(MANY, block_tokens) == LIBRARY | UNTRIED
