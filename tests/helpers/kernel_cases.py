"""Calls of the decode ops over odd sizes, and what they must give: numpy in float64, one sequence and one head at a time."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import Norm, PackedProjection, Projection, pack

ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
}


@dataclasses.dataclass(frozen=True)
class ProductCase:
    """A call of `project`: members as (d_out, rank), rank None for a dense one."""

    d_in: int
    members: tuple[tuple[int, int | None], ...]
    bias: bool = False
    norm: bool = False
    gate: str | None = None
    residual: bool = False
    rank_multiple: int = 8


PRODUCTS = {
    "low rank, ranks differ": ProductCase(264, ((72, 40), (24, 17), (24, 9)), bias=True, norm=True),
    "dense and low rank": ProductCase(264, ((72, None), (24, 17), (40, None)), bias=True, norm=True),
    "dense": ProductCase(136, ((72, None), (24, None)), bias=True, norm=True),
    "gated": ProductCase(72, ((88, 40), (88, 24)), norm=True, gate="silu"),
    "gated, one dense": ProductCase(72, ((88, None), (88, 24)), norm=True, gate="gelu_tanh", bias=True),
    "gated, dense": ProductCase(72, ((88, None), (88, None)), gate="silu"),
    "long, residual": ProductCase(2568, ((72, 40),), residual=True),
    "long, dense, residual": ProductCase(2568, ((40, None),), residual=True, bias=True),
    "full rank": ProductCase(40, ((40, 40),), bias=True),
}


def product_call(
    case: ProductCase, batch: int, dtype: str
) -> tuple[tuple[jax.Array, PackedProjection], dict[str, Any]]:
    """Arguments of the call, random."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape) / shape[-1] ** 0.5, dtype)

    members = []
    for d_out, rank in case.members:
        bias = draw(d_out) if case.bias else None
        if rank is None:
            members.append(Projection(weight=draw(d_out, case.d_in), bias=bias))
        else:
            members.append(Projection(down=draw(rank, case.d_in), up=draw(d_out, rank), bias=bias))
    packed = pack(members, lambda rank: -(-rank // case.rank_multiple) * case.rank_multiple)
    scale = jnp.asarray(1 + 0.3 * rng.standard_normal(case.d_in), dtype)
    options = {
        "norm": Norm(scale, 1e-5) if case.norm else None,
        "gate": case.gate,
        "residual": jnp.asarray(rng.standard_normal((batch, 1, case.members[0][0])), dtype) if case.residual else None,
    }
    return (jnp.asarray(rng.standard_normal((batch, 1, case.d_in)), dtype), packed), options


def product_exact(x: jax.Array, packed: PackedProjection, **options: Any) -> list[np.ndarray]:
    """The call in float64, without rounding between its parts."""
    wide, first = _wide(x), _wide(packed.first)
    if options["norm"] is not None:
        norm = options["norm"]
        wide = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + norm.eps) * (_wide(norm.scale) + norm.offset)
    outputs = []
    for up, bias, start, width in zip(packed.ups, packed.biases, packed.starts, packed.widths, strict=True):
        y = wide @ first[start : start + width].T
        y = y if up is None else y @ _wide(up).T
        outputs.append(y if bias is None else y + _wide(bias))
    if options["gate"] is not None:
        outputs = [ACTIVATIONS[options["gate"]](outputs[0]) * outputs[1]]
    if options["residual"] is not None:
        outputs = [outputs[0] + _wide(options["residual"])]
    return outputs


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """A call of `attend_cached` for one new token a sequence; ``starts`` are the sequences' lengths before it."""

    heads: int
    kv_heads: int
    head_dim: int
    slots: int
    starts: tuple[int, ...]
    window: int | None = None
    norms: bool = False
    offset: float = 0.0
    scale: float | None = None
    softcap: float | None = None
    rotated: bool = True


ATTENTIONS = {
    "first to last slot": AttentionCase(4, 2, 16, 40, (0, 1, 17, 38, 39)),
    "many splits": AttentionCase(4, 1, 128, 700, (699, 1, 64)),
    "one sequence": AttentionCase(4, 4, 64, 300, (255,)),
    "odd sizes": AttentionCase(6, 6, 10, 33, (32, 5, 0), window=5),
    "window and norms": AttentionCase(8, 8, 80, 500, (0, 130, 499), window=130, norms=True),
    "grouped": AttentionCase(10, 2, 64, 200, (3, 199), norms=True),
    "large head": AttentionCase(2, 1, 256, 100, (99, 31)),
    "bounded, offsets to norms": AttentionCase(
        4, 2, 64, 300, (255, 7), 40, norms=True, offset=1.0, scale=0.2, softcap=3.0
    ),
    "not rotated": AttentionCase(4, 4, 16, 40, (0, 39), scale=1.0, rotated=False),
}


def attention_call(case: AttentionCase, dtype: str) -> tuple[tuple[jax.Array, ...], dict[str, Any]]:
    """Arguments of the call, random."""
    rng = np.random.default_rng(0)
    batch = len(case.starts)

    def draw(*shape: int, kind: str = dtype) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), kind)

    q = draw(batch, 1, case.heads * case.head_dim)
    k, v = (draw(batch, 1, case.kv_heads * case.head_dim) for _ in "kv")
    keys, values = (draw(batch, case.kv_heads, case.slots, case.head_dim) for _ in "kv")
    angles = rng.uniform(0, 6, (batch, 1, case.head_dim // 2 if case.rotated else 0))
    start = jnp.asarray(case.starts, jnp.int32)
    norms = [Norm(draw(case.head_dim), 1e-5, case.offset) if case.norms else None for _ in "qk"]
    tables = jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)
    options = {
        "window": case.window,
        "q_norm": norms[0],
        "k_norm": norms[1],
        "scale": case.scale,
        "softcap": case.softcap,
    }
    return (q, k, v, keys, values, *tables, start, start + 1), options


def attention_exact(*args: jax.Array, **options: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The call in float64; the new keys and values are rounded to the cache's dtype, as they must be."""
    q, k, v, keys, values, cos, sin, start, lengths = (_wide(a) for a in args)
    batch, kv_heads, _, head_dim = keys.shape
    q, k, v = (t.reshape(batch, -1, head_dim) for t in (q, k, v))
    round_ = lambda t: _wide(jnp.asarray(t, args[0].dtype))  # noqa: E731
    q, k = (
        round_(_rotated(_normed(t, norm), cos, sin)) for t, norm in ((q, options["q_norm"]), (k, options["k_norm"]))
    )
    out = np.zeros_like(q)
    for b in range(batch):
        position = int(start[b])
        keys[b, :, position], values[b, :, position] = k[b], v[b]
        low = 0 if options["window"] is None else max(0, position - options["window"] + 1)
        for h in range(q.shape[1]):
            g = h // (q.shape[1] // kv_heads)
            scores = keys[b, g, low : int(lengths[b])] @ q[b, h] * (options["scale"] or 1 / np.sqrt(head_dim))
            if options["softcap"] is not None:
                scores = options["softcap"] * np.tanh(scores / options["softcap"])
            weights = np.exp(scores - scores.max())
            out[b, h] = weights @ values[b, g, low : int(lengths[b])] / weights.sum()
    return out.reshape(batch, 1, -1), keys, values


def _normed(x: np.ndarray, norm: Norm | None) -> np.ndarray:
    if norm is None:
        return x
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + norm.eps) * (_wide(norm.scale) + norm.offset)


def _rotated(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    if not cos.size:
        return x
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _wide(array: Any) -> np.ndarray:
    return np.array(array, np.float64)


def relative_error(got: Any, want: np.ndarray) -> float:
    """Norm of the difference over the norm of what is wanted."""
    return float(np.linalg.norm(_wide(got) - want) / np.linalg.norm(want))
