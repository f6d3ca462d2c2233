"""How models are compiled whose layers differ, or whose passes are to take little memory."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from flashsvd_jax.models.pass_options import encoder_options, prompt_options, spares_workspace
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
        assert prompt_options(MANY) is None and encoder_options(FEW, 512) is None
        assert not spares_workspace(FEW, 512)


def test_products_of_prompts_are_a_librarys_and_of_many_kinds_untried() -> None:
    with assume_target(H200):
        assert prompt_options(FEW) == LIBRARY
        assert prompt_options(MANY) == LIBRARY | UNTRIED


@pytest.mark.parametrize("tokens", [None, 128, 512, 4096, 8192])
def test_small_blocks_of_encoders_do_without_a_librarys_workspace(tokens: int | None) -> None:
    with assume_target(H200):
        spares = spares_workspace(FEW, tokens)
        assert spares == (tokens in (512, 4096))
        backends = (encoder_options(FEW, tokens) or {}).get("xla_gpu_experimental_autotune_backends")
        assert (backends is not None and "CUBLAS" not in backends) == spares
        assert not spares_workspace(MANY, tokens)
        assert encoder_options(MANY, tokens) == LIBRARY | UNTRIED
        wide = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), FEW)
        assert not spares_workspace(wide, tokens)
    with assume_target(dataclasses.replace(H200, capability=(7, 5))):
        assert not spares_workspace(FEW, tokens)
