"""The tile programs of prompts and encoders, run by Pallas' interpreter, against PyTorch in float64; sizes are odd."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import relative_error
from prompt_kernel_cases import (
    ATTENDED,
    FEED_FORWARDS,
    STREAMED,
    attended_call,
    attended_exact,
    feed_forward_call,
    feed_forward_exact,
    norm_exact,
    real_queries,
    streamed_call,
    streamed_exact,
)

from pallas_kernels import (
    LayerNorm,
    Norm,
    Op,
    Projection,
    Visible,
    add_norm,
    assume_target,
    attend,
    attend_padded,
    feed_forward,
    layer_norm,
    pack,
    rms_norm,
)
from pallas_kernels.activations import erf_over_root_two
from pallas_kernels.target import H200

INTERPRETED = dataclasses.replace(H200, interpret=True)
TOLERANCE = {"float32": 3e-6, "bfloat16": 1e-2}

in_both = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def run(op: Op, name: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    with assume_target(INTERPRETED):
        return jax.jit(lambda args: op(*args, implementation=name, **options))(args)


@pytest.mark.parametrize("name", ATTENDED)
@in_both
def test_attention_without_scores(name: str, dtype: str) -> None:
    args = attended_call(ATTENDED[name], dtype)
    got, want = run(attend, "triton", args, {}), attended_exact(*args)
    assert got.dtype == dtype and relative_error(got, want) <= TOLERANCE[dtype]
    blind = ~want.any(-1)
    assert not np.asarray(got)[blind].any()


@pytest.mark.parametrize("name", ["causal", "after others"])
def test_queries_that_do_not_matter_change_no_others(name: str) -> None:
    """As chunks of prompts ask for it: of ends of several lengths, some of which lie in a chunk."""
    *given, visible = attended_call(ATTENDED[name], "bfloat16")
    got = run(attend, "triton", (*given, dataclasses.replace(visible, padding="ignored")), {})
    want = attended_exact(*given, visible)
    real = real_queries(visible, want.shape[1])
    assert np.isfinite(np.asarray(got, np.float32)).all() and 0 < real.sum() < real.size
    assert relative_error(np.asarray(got, np.float64)[real], want[real]) <= TOLERANCE["bfloat16"]


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_scores_scaled_otherwise_or_bounded(softcap: float | None) -> None:
    args = attended_call(ATTENDED["causal window"], "float32")
    got = run(attend, "triton", args, {"scale": 0.3, "softcap": softcap})
    want = attend.reference(*args, scale=0.3, softcap=softcap)
    assert relative_error(got, np.asarray(want, np.float64)) <= TOLERANCE["float32"]
    assert relative_error(got, np.asarray(attend.reference(*args), np.float64)) > 0.1


@pytest.mark.parametrize("name", STREAMED)
@in_both
def test_attention_from_rank_space(name: str, dtype: str) -> None:
    args, options = streamed_call(STREAMED[name], dtype)
    got, want = run(attend_padded, "stream", args, options), streamed_exact(*args, **options)
    assert got.dtype == dtype and relative_error(got, want) <= TOLERANCE[dtype]
    real = want.any(-1)
    assert not np.asarray(got)[~real].any() and np.asarray(got)[real].any(-1).all()


@pytest.mark.parametrize("name", FEED_FORWARDS)
@in_both
def test_feed_forward_from_rank_space(name: str, dtype: str) -> None:
    args, options = feed_forward_call(FEED_FORWARDS[name], dtype)
    got = run(feed_forward, "stream", args, options)
    assert got.dtype == dtype
    assert relative_error(got, feed_forward_exact(*args, **options)) <= TOLERANCE[dtype]


@pytest.mark.parametrize(("rows", "width"), [(77, 100), (64, 768), (66, 5120)])
@in_both
def test_norms(rows: int, width: int, dtype: str) -> None:
    rng = np.random.default_rng(0)
    # Far from zero: E[x^2] - E[x]^2 would lose its digits.
    x, added = (jnp.asarray(30 + rng.standard_normal((rows, width)), dtype) for _ in range(2))
    scale, bias = (jnp.asarray(rng.standard_normal(width), dtype) for _ in range(2))
    for norm in (Norm(scale, 1e-5), LayerNorm(scale, bias, 1e-3), LayerNorm(scale, None, 1e-5)):
        alone = run(rms_norm if isinstance(norm, Norm) else layer_norm, "triton", (x, norm), {})
        assert relative_error(alone, norm_exact(x, norm)) <= TOLERANCE[dtype]
        for keep in (True, False):
            total, normed = run(add_norm, "triton", (x, added, norm), {"keep_sum": keep})
            assert relative_error(normed, norm_exact(x, norm, added)) <= TOLERANCE[dtype]
            assert (total is None) is not keep
            if keep:
                np.testing.assert_array_equal(total, x + added)


@pytest.mark.parametrize(("exact", "bound"), [(True, 1e-6), (False, 6e-5)])
def test_the_error_function(exact: bool, bound: float) -> None:
    x = np.linspace(-30, 30, 60001)
    want = [math.erf(v / math.sqrt(2)) for v in x]
    got = erf_over_root_two(jnp.asarray(x, jnp.float32), exact=exact)
    np.testing.assert_allclose(got, want, rtol=0, atol=bound)


def test_refusals_say_why() -> None:
    x = jnp.zeros((1, 256, 40))
    seen = Visible(jnp.full(1, 256, jnp.int32), causal=False)
    low = lambda rank, d_out=64: Projection(down=jnp.zeros((rank, 40)), up=jnp.zeros((d_out, rank)))  # noqa: E731
    dense = Projection(weight=jnp.zeros((64, 40)))
    wide = Projection(down=jnp.zeros((520, 64)), up=jnp.zeros((40, 520)))
    back = Projection(down=jnp.zeros((24, 64)), up=jnp.zeros((40, 24)))
    cases: list[tuple[Op, str, tuple[Any, ...], dict[str, Any], str]] = [
        (attend_padded, "stream", (x, pack([low(16), dense, low(16)]), seen), {"head_dim": 16}, "dense projection"),
        (attend_padded, "stream", (x, pack([low(16), low(200), low(16)]), seen), {"head_dim": 16}, "streams up to 128"),
        (feed_forward, "stream", (x, pack([dense]), pack([back])), {"activation": "gelu"}, "dense projection"),
        (feed_forward, "stream", (x, pack([low(16)]), pack([wide])), {"activation": "gelu"}, "can hold"),
        (feed_forward, "stream", (x[:, :9], pack([low(16)]), pack([back])), {"activation": "gelu"}, "9 tokens"),
        (rms_norm, "triton", (x[:, :9], Norm(jnp.ones(40), 1e-5)), {}, "9 rows"),
        (attend, "cudnn", (*[jnp.zeros((1, 1, 8, 16))] * 3, seen), {}, "only assumed"),
        (attend, "triton", (*[jnp.zeros((1, 1, 8, 300))] * 3, seen), {}, "head_dim 300"),
    ]
    with assume_target(H200):
        for op, name, args, options, reason in cases:
            chosen, refusals = op.choose(*args, **options)
            assert chosen.name != name and reason in refusals[name], (op.name, refusals)
