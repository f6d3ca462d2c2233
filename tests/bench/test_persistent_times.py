"""Variants of the persistent kernel that are timed: each is traced with its parts replaced, and leaves the kernel as it was."""

import jax
import jax.numpy as jnp
import persistent_times
import pytest
from decoder_cases import DecoderCase
from described_device import as_on_device, on_device

from flashsvd_jax.kv_cache import empty_cache
from flashsvd_jax.models.weights import build_weights
from flashsvd_jax.schema import abstract_params, flatten
from flashsvd_jax.shapes import shape_config
from pallas_kernels import assume_target, hardware_rank
from pallas_kernels.persistent import layers
from pallas_kernels.target import H200


def lowered(variant: str) -> str:
    """A small model's steps as text."""
    config = shape_config("tiny", 0.5)
    weights = jax.eval_shape(
        lambda params: build_weights(config, flatten(params).__getitem__, hardware_rank), abstract_params(config)
    )
    cache = jax.eval_shape(lambda: empty_cache(config, 1, 64, jnp.dtype(jnp.bfloat16)))
    weights, cache = (jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16), t) for t in (weights, cache))
    patches = persistent_times.VARIANTS[variant]
    with as_on_device():
        weights, cache = on_device((weights, cache))
        steps = persistent_times.lower_steps(config, weights, cache, patches, 8, lowering_platforms=("cuda",))
    return steps.as_text()


@pytest.mark.parametrize("variant", persistent_times.VARIANTS)
def test_a_variant_lowers_and_leaves_the_kernel_as_it_was(variant: str) -> None:
    patches = persistent_times.VARIANTS[variant]
    before = [getattr(owner, name) for owner, name, _ in patches]
    assert "mosaic_gpu" in lowered(variant)
    assert [getattr(owner, name) for owner, name, _ in patches] == before


def test_a_plan_that_was_made_before_does_not_hide_a_variant() -> None:
    case = DecoderCase(1, 4096, 11008, 32, 32, (1024, 1488), (511,))
    arguments = jax.eval_shape(case.arguments)[:6]
    with assume_target(H200):
        before = layers.plan_here(*arguments)[0]
        for variant in (
            "half the splits",
            "half the parts",
            "inputs of 8 tiles",
            "all row tiles whole",
            "shares uneven by 3",
        ):
            with persistent_times.patched(persistent_times.VARIANTS[variant]):
                assert layers.plan_here(*arguments)[0] != before
            assert layers.plan_here(*arguments)[0] == before
