"""The Triton tile programs, run by Pallas' interpreter, against float64; sizes are odd, batches on both sides of every border."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import (
    ATTENTIONS,
    PRODUCTS,
    attention_call,
    attention_exact,
    product_call,
    product_exact,
    relative_error,
)

from pallas_kernels import LayerNorm, Norm, Op, Target, assume_target, attend_cached, project
from pallas_kernels.target import H200

INTERPRETED = dataclasses.replace(H200, interpret=True)
TOLERANCE = {"float32": 3e-6, "bfloat16": 1e-2}


def run(op: Op, args: tuple[Any, ...], options: dict[str, Any], device: Target = INTERPRETED) -> Any:
    """The op's Triton implementation; what is no array stays out of the trace."""
    with assume_target(device):
        return jax.jit(lambda args: op(*args, implementation="triton", **options))(args)


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize(("batch", "dtype"), [(1, "bfloat16"), (3, "float32"), (5, "bfloat16"), (17, "float32")])
def test_project(name: str, batch: int, dtype: str) -> None:
    args, options = product_call(PRODUCTS[name], batch, dtype)
    outputs = run(project, args, options)
    for got, want in zip(outputs, product_exact(*args, **options), strict=True):
        assert got.dtype == dtype and got.shape == want.shape
        assert relative_error(got, want) <= TOLERANCE[dtype]


def test_outputs_in_another_dtype_are_not_rounded_on_the_way() -> None:
    (x, packed), options = product_call(PRODUCTS["long, dense, residual"], 1, "bfloat16")
    options |= {"residual": None, "dtype": jnp.float32}
    (got,) = run(project, (x, packed), options)
    (want,) = product_exact(x, packed, norm=None, gate=None, residual=None)
    assert got.dtype == jnp.float32
    assert relative_error(got, want) < 1e-6


@pytest.mark.parametrize("batch", [1, 17])
@pytest.mark.parametrize("kind", ["offset", "layer"])
def test_norms_that_programs_do_not_fold_in_come_before_them(kind: str, batch: int) -> None:
    (x, packed), options = product_call(PRODUCTS["gated"], batch, "float32")
    scale = options["norm"].scale
    norm = Norm(scale, 1e-5, 1.0) if kind == "offset" else LayerNorm(scale, 0.3 * scale, 1e-5)
    options = {**options, "norm": norm}
    (got,), (want,) = run(project, (x, packed), options), project.reference(x, packed, **options)
    assert relative_error(got, np.asarray(want, np.float64)) <= TOLERANCE["float32"]


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attend_cached(name: str, dtype: str) -> None:
    args, options = attention_call(ATTENTIONS[name], dtype)
    attended, keys, values = run(attend_cached, args, options)
    want, want_keys, want_values = attention_exact(*args, **options)
    assert attended.shape == want.shape and attended.dtype == keys.dtype == dtype
    assert relative_error(attended, want) <= TOLERANCE[dtype]
    assert relative_error(keys, want_keys) <= TOLERANCE[dtype]
    np.testing.assert_array_equal(np.asarray(values, np.float64), want_values)


def test_a_length_that_excludes_the_new_token_and_one_that_excludes_everything() -> None:
    args, options = attention_call(ATTENTIONS["first to last slot"], "float32")
    short = (*args[:-1], jnp.asarray([0, 1, 5, 38, 20], jnp.int32))
    attended, keys, _ = run(attend_cached, short, options)
    reference, reference_keys, _ = attend_cached.reference(*short, **options)
    np.testing.assert_allclose(attended, reference, rtol=0, atol=1e-6)
    np.testing.assert_allclose(keys, reference_keys, rtol=0, atol=1e-6)
    assert not np.asarray(attended[0]).any()


def test_all_sequences_may_share_one_position() -> None:
    args, options = attention_call(ATTENTIONS["first to last slot"], "float32")
    same = (*args[:-2], jnp.int32(7), jnp.full((5,), 8, jnp.int32))
    for got, want in zip(run(attend_cached, same, options), attend_cached.reference(*same, **options), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


def test_refusals_say_why() -> None:
    (x, packed), _ = product_call(PRODUCTS["dense"], 3, "float32")
    cases = [
        (project, (jnp.zeros((33, 136)), packed), {}, "33 rows"),
        (project, (x.astype(jnp.bfloat16), packed), {}, "bfloat16"),
        (project, product_call(dataclasses.replace(PRODUCTS["dense"], d_in=132), 1, "float32")[0], {}, "multiple of 8"),
    ]
    args, _ = attention_call(ATTENTIONS["grouped"], "float32")
    two = [jnp.concatenate([a, a], axis=1) for a in args[:3]]
    tables = [table[..., :3] for table in args[5:7]]
    cases += [
        (attend_cached, (*two, *args[3:]), {}, "2 new tokens"),
        (attend_cached, (*args[:5], *tables, *args[7:]), {}, "6 of 64 columns of a head rotated"),
    ]
    with assume_target(H200):
        for op, arguments, keywords, reason in cases:
            chosen, refusals = op.choose(*arguments, **keywords)
            assert chosen.name != "triton" and reason in refusals["triton"]


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        (Target("cpu"), "cpu"),
        (Target("rocm", "gfx942"), "rocm"),
        (Target("cuda", "NVIDIA T4", (7, 5), 40), "7.5"),
        (Target("cuda", "NVIDIA B300", (10, 3), 148), "10.3"),
    ],
)
def test_other_devices_are_refused(device: Target, reason: str) -> None:
    args, options = product_call(PRODUCTS["dense"], 1, "float32")
    with assume_target(device):
        chosen, refusals = project.choose(*args, **options)
    assert chosen.name != "triton" and reason in refusals["triton"]
