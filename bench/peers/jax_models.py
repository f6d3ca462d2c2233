"""Plain JAX baselines of prompts and encoders, as one would write them: `einsum` in bfloat16, attention by cuDNN or with scores.

Each projection is a weight [out, in] or two factors (down [rank, in], up [out, rank]); XLA does the rest. On a CPU, which has no
cuDNN, attention is `jax.nn`'s own.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Weight = tuple[jax.Array, ...]
Sizes = dict[str, int]
"""width, inner, heads, kv_heads, layers, vocab."""


def draw(key: jax.Array, d_out: int, d_in: int, rank: int | None) -> Weight:
    """A random projection."""
    shapes = [(d_out, d_in)] if rank is None else [(rank, d_in), (d_out, rank)]
    keys = jax.random.split(key, len(shapes))
    return tuple(
        (jax.random.normal(k, s, jnp.float32) * s[1] ** -0.5).astype(jnp.bfloat16)
        for k, s in zip(keys, shapes, strict=True)
    )


def product(x: jax.Array, weight: Weight) -> jax.Array:
    """x [..., in] through a projection, each factor rounded."""
    for factor in weight:
        x = jnp.einsum("...i,oi->...o", x, factor)
    return x


def attention(q: jax.Array, k: jax.Array, v: jax.Array, head_dim: int, *, causal: bool, scores: bool) -> jax.Array:
    """[batch, tokens, heads * head_dim], with the scores in memory or by cuDNN."""
    q, k, v = (a.reshape(*a.shape[:2], -1, head_dim) for a in (q, k, v))
    by = "xla" if scores or jax.default_backend() == "cpu" else "cudnn"
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation=by).reshape(*q.shape[:2], -1)


def rotated(x: jax.Array, head_dim: int, theta: float) -> jax.Array:
    """x [batch, tokens, heads * head_dim] turned by its tokens' positions, each head's halves against each other."""
    half = head_dim // 2
    angles = jnp.arange(x.shape[1])[:, None] * theta ** -(jnp.arange(half) / half)
    cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
    first, second = jnp.split(x.reshape(*x.shape[:2], -1, head_dim).astype(jnp.float32), 2, -1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    return turned.reshape(x.shape).astype(x.dtype)


def decoder_weights(sizes: Sizes, ranks: Callable[[str], int | None]) -> dict[str, Any]:
    """Random weights of a Llama; ``ranks`` of a projection by its name."""
    d, inner, head_dim = sizes["width"], sizes["inner"], sizes["width"] // sizes["heads"]
    kv = sizes["kv_heads"] * head_dim
    shapes = {
        "q": (d, d),
        "k": (kv, d),
        "v": (kv, d),
        "o": (d, d),
        "gate": (inner, d),
        "up": (inner, d),
        "down": (d, inner),
    }
    keys = iter(jax.random.split(jax.random.key(0), sizes["layers"] * len(shapes) + 2))
    layers = [{n: draw(next(keys), *s, ranks(n)) for n, s in shapes.items()} for _ in range(sizes["layers"])]
    return {
        "embed": draw(next(keys), sizes["vocab"], d, None)[0],
        "layers": layers,
        "head": draw(next(keys), sizes["vocab"], d, None),
    }


def prefill(sizes: Sizes, weights: dict[str, Any], tokens: jax.Array) -> tuple[Any, jax.Array]:
    """Keys and values of a prompt, and the logits of its last token."""
    head_dim = sizes["width"] // sizes["heads"]
    x, cache = weights["embed"][tokens], []
    for layer in weights["layers"]:
        y = _rms_norm(x)
        q, k = (rotated(product(y, layer[name]), head_dim, 10000.0) for name in "qk")
        v = product(y, layer["v"])
        cache.append((k, v))
        x = x + product(attention(q, k, v, head_dim, causal=True, scores=False), layer["o"])
        y = _rms_norm(x)
        x = x + product(jax.nn.silu(product(y, layer["gate"])) * product(y, layer["up"]), layer["down"])
    return cache, product(_rms_norm(x[:, -1]), weights["head"]).astype(jnp.float32)


def encoder_weights(sizes: Sizes, ranks: Callable[[str], int | None]) -> list[dict[str, Any]]:
    """Random layers of a BERT, with biases."""
    d, inner = sizes["width"], sizes["inner"]
    shapes = {"q": (d, d), "k": (d, d), "v": (d, d), "o": (d, d), "up": (inner, d), "down": (d, inner)}
    keys = iter(jax.random.split(jax.random.key(0), sizes["layers"] * len(shapes)))
    return [
        {n: (draw(next(keys), *s, ranks(n)), jnp.zeros(s[0], jnp.bfloat16)) for n, s in shapes.items()}
        for _ in range(sizes["layers"])
    ]


def encode(sizes: Sizes, scores: bool, layers: list[dict[str, Any]], x: jax.Array) -> jax.Array:
    """Hidden states after all layers, from embeddings x [batch, tokens, width]."""
    head_dim = sizes["width"] // sizes["heads"]

    def linear(x: jax.Array, projection: tuple[Weight, jax.Array]) -> jax.Array:
        return product(x, projection[0]) + projection[1]

    for layer in layers:
        q, k, v = (linear(x, layer[name]) for name in "qkv")
        attended = attention(q, k, v, head_dim, causal=False, scores=scores)
        x = layer_norm(x + linear(attended, layer["o"]))
        x = layer_norm(x + linear(jax.nn.gelu(linear(x, layer["up"]), approximate=False), layer["down"]))
    return x


def _rms_norm(x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt((wide * wide).mean(-1, keepdims=True) + 1e-5)).astype(x.dtype)


def layer_norm(x: jax.Array, eps: float = 1e-12) -> jax.Array:
    """Over the last axis, in float32; with neither weight nor bias."""
    wide = x.astype(jnp.float32)
    wide = wide - wide.mean(-1, keepdims=True)
    return (wide * jax.lax.rsqrt((wide * wide).mean(-1, keepdims=True) + eps)).astype(x.dtype)
