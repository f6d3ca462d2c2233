"""The decode kernels on a GPU: each op against float64, whole models against float32 and against plain XLA."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import (
    ATTENTIONS,
    PRODUCTS,
    AttentionCase,
    ProductCase,
    attention_call,
    attention_exact,
    product_call,
    product_exact,
    relative_error,
)
from near_ties import shortfalls
from persistent_faults import skip_unless_hopper

from converters import convert
from flashsvd_jax import SamplingParams, batch_generate, load
from flashsvd_jax.bundled import COMPRESSED, DENSE
from flashsvd_jax.models import decoder, prompts
from flashsvd_jax.random_weights import random_weights
from flashsvd_jax.shapes import shape_config
from pallas_kernels import attend_cached, prefer, project, record

pytestmark = pytest.mark.gpu

TOLERANCE = {"float32": 1e-5, "bfloat16": 1.2e-2, "float16": 2e-3}

LARGE_PRODUCTS = PRODUCTS | {
    "7B q, k, v": ProductCase(4096, ((4096, 1024),) * 3, norm=True),
    "8B q, k, v": ProductCase(4096, ((4096, 1228), (1024, 491), (1024, 491)), norm=True, rank_multiple=128),
    "7B gate, up": ProductCase(4096, ((11008, 1492), (11008, 1488)), norm=True, gate="silu"),
    "7B down": ProductCase(11008, ((4096, 1492),), residual=True, rank_multiple=128),
    "7B down, dense": ProductCase(11008, ((4096, None),), residual=True),
}
LARGE_ATTENTIONS = ATTENTIONS | {
    "7B": AttentionCase(32, 32, 128, 592, (591, 0, 1, 63, 64, 65, 300, 511)),
    "8B, long": AttentionCase(32, 8, 128, 8208, (8207, 4096)),
    "8B, one": AttentionCase(32, 8, 128, 16384, (16383,)),
    "32 sequences": AttentionCase(8, 2, 128, 320, tuple(range(7, 320, 10))),
}


@pytest.mark.parametrize("name", LARGE_PRODUCTS)
@pytest.mark.parametrize(
    ("batch", "dtype"),
    [
        (1, "bfloat16"),
        (2, "bfloat16"),
        (4, "float32"),
        (5, "float16"),
        (8, "bfloat16"),
        (17, "float32"),
        (32, "bfloat16"),
    ],
)
def test_project(name: str, batch: int, dtype: str) -> None:
    args, options = product_call(LARGE_PRODUCTS[name], batch, dtype)
    run = jax.jit(lambda args: project(*args, implementation="triton", **options))
    outputs = run(args)
    for got, again, want in zip(outputs, run(args), product_exact(*args, **options), strict=True):
        assert relative_error(got, want) <= TOLERANCE[dtype]
        np.testing.assert_array_equal(got, again)


@pytest.mark.parametrize("name", LARGE_ATTENTIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attend_cached(name: str, dtype: str) -> None:
    args, options = attention_call(LARGE_ATTENTIONS[name], dtype)
    run = jax.jit(lambda args: attend_cached(*args, implementation="triton", **options))
    results = run(args)
    for got, again, want in zip(results, run(args), attention_exact(*args, **options), strict=True):
        assert relative_error(got, want) <= TOLERANCE[dtype]
        np.testing.assert_array_equal(got, again)


@pytest.mark.parametrize("name", ["products", "persistent"])
def test_the_bundled_model_says_the_same_with_and_without_kernels(name: str, tmp_path: Path) -> None:
    """Up to a tie within what rounding changes, from which on each goes on with what it said."""
    if name == "persistent":
        skip_unless_hopper()
    prompt = "def area(width, height):\n    return"
    convert(COMPRESSED, tmp_path / "model", base=DENSE, progress=False)
    for kernels in (name, "xla"):
        model = load(tmp_path / "model", kernels=kernels, max_length=640, dtype="bfloat16")
        params = SamplingParams(temperature=0.0, max_tokens=512, ignore_eos=True)
        said, again = (batch_generate(model, [prompt], params)[0].token_ids for _ in range(2))
        assert said == again
        assert set(model.engine(1).kernels_used["decode_layers"]) == {kernels}
        assert len(said) == 512
        assert model.tokenizer is not None
        short, rounding = shortfalls(model.config, model.weights, model.tokenizer.encode(prompt), said)
        assert (short <= rounding).all()
        assert (short > 0).sum() <= 5


@pytest.mark.parametrize("name", ["products", "persistent"])
def test_logits_of_a_7b_model_are_as_near_to_float32_as_those_of_plain_xla(name: str) -> None:
    if name == "persistent":
        skip_unless_hopper()
    config = shape_config("llama-2-7b", 0.5)
    weights = random_weights(config)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, 65)).astype(np.int32)

    def step(kernels: str | None, used: dict[str, Any]) -> np.ndarray:
        def decode(weights: Any) -> jax.Array:
            with prefer(kernels), record(used):
                chunk = prompts.begin(config, weights, jnp.asarray(tokens[:, :64]), jnp.int32(0), jnp.array([64]))
                cache, _ = prompts.first_chunk(
                    config, 128, prompts.LayerRun(weights.layers, config.windows, 1, True), chunk
                )
                return decoder.decode(config, weights, cache, jnp.asarray(tokens[:, 64]), jnp.array([64]))[1]

        return np.asarray(jax.jit(decode)(weights), np.float64)

    used: dict[str, Any] = {}
    kernels, plain = step(name, used), step("xla", {})
    assert set(used["decode_layers"]) == {name}
    assert name == "persistent" or ("triton" in used["project"] and "triton" in used["attend_cached"])
    weights = jax.tree.map(lambda a: a.astype(jnp.float32), weights)
    with jax.default_matmul_precision("highest"):
        exact = np.asarray(
            jax.jit(lambda w: decoder.full_logits(config, w, jnp.asarray(tokens)))(weights)[:, -1], np.float64
        )
    errors = {name: relative_error(got, exact) for name, got in (("kernels", kernels), ("xla", plain))}
    print(errors)
    assert errors["kernels"] <= 1.2 * errors["xla"] and errors["kernels"] < 0.1
