"""Arguments of the op `decode_layers`, random: small decoders of every structure that kernels have to serve."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import DecoderLayer, Norm, PackedProjection, Projection, hardware_rank, pack


@dataclasses.dataclass(frozen=True)
class DecoderCase:
    """A decoder and where its sequences stand.

    ``ranks`` are those of the attention's projections and of the MLP's, None for dense ones; ``varied`` draws each between half and
    1.3 times that; sites in ``dense``, such as "0.q" or "1.down", are dense whatever their ranks. ``biases`` are those of q, k and
    v, ``more_biases`` all others of the layers. Low-rank layers may be ``absorbed``, see `DecoderLayer.o_gate_up`. ``starts`` are
    positions of the new tokens, one a sequence.
    """

    layers: int
    width: int
    ff: int
    heads: int
    kv_heads: int
    ranks: tuple[int | None, int | None]
    starts: tuple[int, ...]
    slots: int = 256
    vocab: int = 1000
    qk_norm: bool = False
    biases: bool = False
    more_biases: bool = False
    gate: str = "silu"
    dense: tuple[str, ...] = ()
    varied: bool = False
    window: int | None = None
    absorbed: bool = False
    head_dim: int = 128
    dtype: Any = jnp.bfloat16

    def arguments(self, seed: int = 0) -> tuple[Any, ...]:
        """Of the op."""
        rng, keys = np.random.default_rng(seed), iter(jax.random.split(jax.random.key(seed), 4000))
        draw = lambda *shape, scale=1.0: _draw(next(keys), shape, scale, self.dtype)  # noqa: E731
        norm = lambda d: Norm(1 + draw(d, scale=0.2), 1e-5)  # noqa: E731
        project = partial(_projections, self, rng, draw)
        attention, mlp = self.ranks
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layers = [
            DecoderLayer(
                input_norm=norm(self.width),
                qkv=project(self.width, self._ranks(i, "qkv", attention), q, kv, kv, biases=self.biases),
                q_norm=norm(self.head_dim) if self.qk_norm else None,
                k_norm=norm(self.head_dim) if self.qk_norm else None,
                o=project(q, self._ranks(i, ["o"], attention), self.width, biases=self.more_biases),
                mlp_norm=norm(self.width),
                gate_up=project(
                    self.width, self._ranks(i, ["gate", "up"], mlp), self.ff, self.ff, biases=self.more_biases
                ),
                down=project(self.ff, self._ranks(i, ["down"], mlp), self.width, biases=self.more_biases),
                gate=self.gate,
                window=self.window,
            )
            for i in range(self.layers)
        ]
        layers = [_absorbed(layer) for layer in layers] if self.absorbed else layers
        batch = len(self.starts)
        cache = [tuple(draw(batch, self.kv_heads, self.slots, self.head_dim) for _ in layers) for _ in range(2)]
        angles = jax.random.uniform(next(keys), (batch, 1, self.head_dim // 2), maxval=6.0)
        head = project(self.width, [None], self.vocab)
        starts = jnp.array(self.starts, jnp.int32)
        return (
            draw(batch, 1, self.width),
            layers,
            norm(self.width),
            head,
            *cache,
            jnp.cos(angles),
            jnp.sin(angles),
            starts,
        )

    def _ranks(self, layer: int, sites: Sequence[str], rank: int | None) -> list[int | None]:
        return [None if f"{layer}.{site}" in self.dense else rank for site in sites]


def _absorbed(layer: DecoderLayer) -> DecoderLayer:
    arrays: tuple[Any, ...] = (layer.gate_up.first, layer.mlp_norm.scale, layer.o.ups[0])
    first, scale, up = (array.astype(jnp.float32) for array in arrays)
    product = jnp.dot(first * scale, up, precision="highest")
    return dataclasses.replace(layer, o_gate_up=product.astype(layer.gate_up.first.dtype))


def _projections(
    case: DecoderCase, rng: np.random.Generator, draw: Callable[..., jax.Array], d_in: int, ranks: Sequence[int | None],
    *d_outs: int, biases: bool = False,
) -> PackedProjection:  # fmt: skip
    def one(d_out: int, rank: int | None) -> Projection:
        bias = draw(d_out, scale=0.1) if biases else None
        if rank is None:
            return Projection(weight=draw(d_out, d_in, scale=d_in**-0.5), bias=bias)
        own = int(rank * rng.uniform(0.5, 1.3)) // 8 * 8 if case.varied else rank
        return Projection(down=draw(own, d_in, scale=d_in**-0.5), up=draw(d_out, own, scale=own**-0.5), bias=bias)

    return pack([one(d_out, rank) for d_out, rank in zip(d_outs, ranks, strict=True)], pad_rank=hardware_rank)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _draw(key: jax.Array, shape: tuple[int, ...], scale: float, dtype: Any) -> jax.Array:
    return (scale * jax.random.normal(key, shape)).astype(dtype)
