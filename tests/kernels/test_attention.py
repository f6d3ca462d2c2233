"""Attention against float64 and against PyTorch: masks, grouped heads, rows that see nothing, and dtypes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from pallas_kernels import Visible, assume_target, attend, cudnn
from pallas_kernels.attention import masked_attention
from pallas_kernels.target import H200

SIZES = {  # (batch, heads, kv_heads, queries, keys, head_dim)
    "one_query": (2, 6, 2, 1, 19, 10),
    "grouped": (2, 6, 3, 5, 7, 14),
    "one_kv_head": (3, 4, 1, 8, 8, 6),
    "no_groups": (1, 5, 5, 3, 11, 2),
}


@pytest.fixture(params=SIZES)
def arrays(request: pytest.FixtureRequest) -> tuple[np.ndarray, ...]:
    """q, k, v and a random mask in which every query sees its first key."""
    batch, heads, kv_heads, queries, keys, head_dim = SIZES[request.param]
    rng = np.random.default_rng(0)
    shapes = ((batch, heads, queries, head_dim), (batch, kv_heads, keys, head_dim), (batch, kv_heads, keys, head_dim))
    q, k, v = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    mask = rng.random((batch, queries, keys)) < 0.6
    mask[..., 0] = True
    return q, k, v, mask


def exact(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """One query at a time, in float64; -> [batch, queries, heads * head_dim]."""
    batch, heads, queries, head_dim = q.shape
    out = np.zeros((batch, queries, heads, head_dim))
    for b, h, t in np.ndindex(batch, heads, queries):
        seen = mask[b, t]
        if seen.any():
            kv_head = h // (heads // k.shape[1])
            scores = k[b, kv_head, seen].astype(np.float64) @ q[b, h, t] / np.sqrt(head_dim)
            weights = np.exp(scores - scores.max())
            out[b, t, h] = weights @ v[b, kv_head, seen] / weights.sum()
    return out.reshape(batch, queries, -1)


def test_is_softmax_attention_over_visible_keys(arrays: tuple[np.ndarray, ...]) -> None:
    got = jax.jit(masked_attention)(*arrays)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, exact(*arrays), rtol=0, atol=2e-6)


def test_scores_may_be_scaled_otherwise_and_bounded(arrays: tuple[np.ndarray, ...]) -> None:
    """In float64; head h reads the kv head of its group."""
    q, k, v, mask = (a if a.dtype == bool else a.astype(np.float64) for a in arrays)
    k, v = (np.repeat(a, q.shape[1] // a.shape[1], axis=1) for a in (k, v))
    scores = np.where(mask[:, None], 1.3 * np.tanh(0.7 * q @ k.swapaxes(2, 3) / 1.3), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    want = (weights / weights.sum(-1, keepdims=True) @ v).swapaxes(1, 2).reshape(*q.shape[:1], q.shape[2], -1)
    np.testing.assert_allclose(masked_attention(*arrays, 0.7, 1.3), want, rtol=0, atol=3e-6)


def test_agrees_with_torch(arrays: tuple[np.ndarray, ...]) -> None:
    q, k, v, mask = map(torch.tensor, arrays)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask[:, None], enable_gqa=True)
    want = want.transpose(1, 2).flatten(2)
    np.testing.assert_allclose(masked_attention(*arrays), want, rtol=0, atol=2e-6)


def test_a_query_that_may_look_nowhere_gives_zeros_and_disturbs_no_other(arrays: tuple[np.ndarray, ...]) -> None:
    q, k, v, mask = arrays
    blind = mask.copy()
    blind[0, -1] = False
    got, seeing = np.asarray(masked_attention(q, k, v, blind)), np.asarray(masked_attention(q, k, v, mask))
    assert not got[0, -1].any()
    np.testing.assert_array_equal(got[0, :-1], seeing[0, :-1])
    np.testing.assert_array_equal(got[1:], seeing[1:])


def test_a_batch_that_sees_nothing_at_all_gives_zeros(arrays: tuple[np.ndarray, ...]) -> None:
    q, k, v, mask = arrays
    assert not np.asarray(masked_attention(q, k, v, np.zeros_like(mask))).any()


def test_hidden_keys_do_not_matter_however_large(arrays: tuple[np.ndarray, ...]) -> None:
    q, k, v, mask = arrays
    hidden = ~mask.any(axis=1)
    hidden[:, -1] = True
    mask = mask & ~hidden[:, None]
    loud = np.where(hidden[:, None, :, None], np.float32(1e4), 1)
    np.testing.assert_array_equal(masked_attention(q, k * loud, v * loud, mask), masked_attention(q, k, v, mask))


@pytest.mark.parametrize("arrays", ["grouped"], indirect=True)
@pytest.mark.parametrize("scale", [1e3, 1e-3])
def test_scores_far_from_one_stay_finite(arrays: tuple[np.ndarray, ...], scale: float) -> None:
    q, k, v, mask = arrays
    q = q * np.float32(scale)
    np.testing.assert_allclose(masked_attention(q, k, v, mask), exact(q, k, v, mask), rtol=0, atol=1e-4)


def test_bfloat16_in_and_out_with_scores_in_float32(arrays: tuple[np.ndarray, ...]) -> None:
    *halves, mask = (a if a.dtype == bool else a.astype(jnp.bfloat16) for a in arrays)
    got = np.asarray(jax.jit(masked_attention)(*halves, mask))
    assert got.dtype == jnp.bfloat16
    want = exact(*(a.astype(np.float32) for a in halves), mask)
    eps = float(jnp.finfo(jnp.bfloat16).eps)
    np.testing.assert_allclose(got.astype(np.float32), want, rtol=eps, atol=eps)


@pytest.mark.parametrize("padding", ["blind", "sighted"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 3])
def test_what_is_visible(causal: bool, window: int | None, padding: Any) -> None:
    ends, starts, queries, keys = [7, 4, 0], [2, 3, 0], 4, 9
    real = np.random.default_rng(0).random((3, keys)) < 0.7
    visible = Visible(
        jnp.asarray(ends), jnp.asarray(real), jnp.asarray(starts), causal=causal, window=window, padding=padding
    )
    got = np.asarray(visible.mask(queries, keys))
    for b, t, s in np.ndindex(3, queries, keys):
        own = starts[b] + t
        is_token = lambda place: place < ends[b] and real[b, place]  # noqa: B023, E731
        want = is_token(s) and (s <= own or not causal) and (window is None or abs(own - s) < window)
        assert got[b, t, s] == (want and (is_token(own) or padding == "sighted")), (b, t, s)


def test_the_op_is_attention_over_what_is_visible(arrays: tuple[np.ndarray, ...]) -> None:
    q, k, v, _ = arrays
    start = k.shape[2] - q.shape[2]
    visible = Visible(jnp.full(len(q), k.shape[2], jnp.int32), start=jnp.int32(start))
    mask = np.tril(np.ones((q.shape[2], k.shape[2]), bool), start)
    np.testing.assert_allclose(attend(q, k, v, visible), exact(q, k, v, np.stack([mask] * len(q))), rtol=0, atol=2e-6)


@pytest.mark.parametrize("options", [{"scale": 0.3}, {"softcap": 50.0}])
def test_the_library_refuses_bounded_scores_and_few_queries(options: dict[str, float]) -> None:
    for tokens in (128, 64):
        q = jnp.zeros((1, 2, tokens, 64), jnp.bfloat16)
        visible = Visible(jnp.full(1, tokens, jnp.int32), padding="ignored")
        with assume_target(H200):
            suits_hopper = tokens == 128 and "softcap" not in options
            assert attend.choose(q, q, q, visible, **options)[0].name == ("hopper" if suits_hopper else "triton")
            reason = cudnn.refuses(q, q, q, visible, **options)
        assert reason == (
            "bounded scores"
            if "softcap" in options
            else None
            if tokens == 128
            else "64 queries; it is for 128 and more"
        )
