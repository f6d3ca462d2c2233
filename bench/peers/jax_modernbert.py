"""A plain JAX baseline of ModernBERT, as `jax_models` has them of others: layers that see everything and layers with a window."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from flashsvd_jax.encoder_config import EncoderConfig
from peers.jax_models import Weight, attention, draw, layer_norm, product, rotated

Layer = dict[str, Weight]
_EPS = 1e-5


def modernbert_weights(config: EncoderConfig, ranks: Callable[[str], int | None]) -> list[Layer]:
    """Random layers; ``ranks`` of a projection by its name."""
    d, inner = config.hidden_size, config.intermediate_size
    shapes = {"qkv": (3 * d, d), "o": (d, d), "gate_up": (2 * inner, d), "down": (d, inner)}
    keys = iter(jax.random.split(jax.random.key(0), config.num_layers * len(shapes)))
    return [{n: draw(next(keys), *s, ranks(n)) for n, s in shapes.items()} for _ in range(config.num_layers)]


def modernbert(config: EncoderConfig, scores: bool, layers: list[Layer], x: jax.Array) -> jax.Array:
    """Hidden states after all layers and the last norm, from embeddings x [batch, tokens, width]."""
    for index, (layer, window, rope) in enumerate(zip(layers, config.windows, config.ropes, strict=True)):
        qkv = product(x if index == 0 else layer_norm(x, _EPS), layer["qkv"])
        q, k, v = jnp.split(qkv, 3, axis=-1)
        q, k = (rotated(a, config.head_dim, rope.theta) for a in (q, k))
        if window is None:
            attended = attention(q, k, v, config.head_dim, causal=False, scores=scores)
        else:
            attended = windowed_attention(q, k, v, config.head_dim, window, whole=scores)
        x = x + product(attended, layer["o"])
        gate, up = jnp.split(product(layer_norm(x, _EPS), layer["gate_up"]), 2, axis=-1)
        x = x + product(jax.nn.gelu(gate, approximate=False) * up, layer["down"])
    return layer_norm(x, _EPS)


def windowed_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, head_dim: int, window: int, *, whole: bool
) -> jax.Array:
    """[batch, tokens, width], where tokens see ``window`` others to either side.

    cuDNN has no such window, so tokens go in blocks of it, each of which sees itself and both neighbours; or with the ``whole``
    scores in memory, and the most of them masked.
    """
    heads = [a.reshape(*a.shape[:2], -1, head_dim) for a in (q, k, v)]
    if whole:
        out = jax.nn.dot_product_attention(*heads, local_window_size=(window, window), implementation="xla")
        return out.reshape(q.shape)
    tokens = q.shape[1]
    blocks = -(-tokens // window)
    q, k, v = (_blocks(a, blocks, window) for a in heads)
    # The first block's left neighbour is the last, and the other way round: masked below.
    k, v = (jnp.concatenate([jnp.roll(a, 1, axis=1), a, jnp.roll(a, -1, axis=1)], axis=2) for a in (k, v))
    at = jnp.arange(blocks * window).reshape(blocks, window)
    keys = jnp.concatenate([at - window, at, at + window], axis=1)
    near = jnp.abs(at[:, :, None] - keys[:, None]) <= window
    seen = near & (keys >= 0)[:, None] & (keys < tokens)[:, None]
    products = jnp.einsum("bnqhd,bnkhd->bnhqk", q, k, preferred_element_type=jnp.float32) * head_dim**-0.5
    shares = jax.nn.softmax(jnp.where(seen[:, None], products, -jnp.inf), axis=-1).astype(v.dtype)
    out = jnp.einsum("bnhqk,bnkhd->bnqhd", shares, v)
    return out.reshape(out.shape[0], blocks * window, -1)[:, :tokens]


def _blocks(x: jax.Array, blocks: int, window: int) -> jax.Array:
    """[batch, tokens, heads, head_dim] -> [batch, blocks, window, heads, head_dim], filled with zeros."""
    padded = jnp.pad(x, ((0, 0), (0, blocks * window - x.shape[1]), (0, 0), (0, 0)))
    return padded.reshape(x.shape[0], blocks, window, *x.shape[2:])
