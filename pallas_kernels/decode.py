"""The op `decode_layers`: all that a decoder does with one new token a sequence, so that one kernel may do it."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention import attend_cached, attend_cached_reference
from pallas_kernels.norm import LayerNorm, Norm, norm_reference
from pallas_kernels.products import ACTIVATIONS, project, project_reference
from pallas_kernels.projection import PackedProjection
from pallas_kernels.registry import Implementation, Op

STALL_INTEGERS = 4  # of which the first says where a kernel gave up; one alone XLA would copy by a launch of its own


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecoderLayer:
    """One transformer block, with its norms before attention and before the MLP.

    Attributes:
      input_norm, qkv: before attention; three members.
      q_norm, k_norm: over head_dim, before rotation; None if the model has none.
      o: output projection.
      mlp_norm, gate_up, down: the MLP; gate and up are two members, or up alone is one.
      gate: name of the activation, of the gate or of up alone; as for `project`.
      window: a query sees this many positions, itself included; all before it if None.
      attention_out_norm, mlp_out_norm: over what attention and MLP add to the residual stream; None if the model has none.
      scale, softcap: of attention scores, as for `attend`.
      rotation: which of the tables of cosines and sines, where there are several.
      o_gate_up: what the latents of the output projection add to those of gate and up, [latents of both, latents of o]: the first
        factors of gate and up, times the norm's scale, times the second factor of o. A kernel may use it; None if nobody has made
        it.
    """

    input_norm: Norm | LayerNorm
    qkv: PackedProjection
    q_norm: Norm | None
    k_norm: Norm | None
    o: PackedProjection
    mlp_norm: Norm | LayerNorm
    gate_up: PackedProjection
    down: PackedProjection
    gate: str = dataclasses.field(metadata={"static": True})
    window: int | None = dataclasses.field(metadata={"static": True})
    attention_out_norm: Norm | LayerNorm | None = None
    mlp_out_norm: Norm | LayerNorm | None = None
    scale: float | None = dataclasses.field(default=None, metadata={"static": True})
    softcap: float | None = dataclasses.field(default=None, metadata={"static": True})
    rotation: int = dataclasses.field(default=0, metadata={"static": True})
    o_gate_up: jax.Array | None = None


def after_attention(
    product: Callable[..., tuple[jax.Array, ...]], x: jax.Array, attended: jax.Array, layer: DecoderLayer
) -> jax.Array:
    """The residual stream x [..., width] after a layer's output projection of ``attended`` and its MLP.

    ``product`` is `project`, or its reference.
    """
    with jax.named_scope("attention_out"):
        x = _added(product, x, attended, layer.o, layer.attention_out_norm)
    with jax.named_scope("mlp"):
        if len(layer.gate_up.widths) == 2:
            (inner,) = product(x, layer.gate_up, norm=layer.mlp_norm, gate=layer.gate)
        else:
            (inner,) = product(x, layer.gate_up, norm=layer.mlp_norm)
            inner = ACTIVATIONS[layer.gate](inner)
        return _added(product, x, inner, layer.down, layer.mlp_out_norm)


def _added(
    product: Callable[..., tuple[jax.Array, ...]], x: jax.Array, inner: jax.Array, packed: PackedProjection,
    norm: Norm | LayerNorm | None,
) -> jax.Array:  # fmt: skip
    """The residual stream x with a projection of ``inner`` added to it, normed before where there is a norm."""
    if norm is None:
        return product(inner, packed, residual=x)[0]
    return x + norm_reference(product(inner, packed)[0], norm)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Carried:
    """What steps that follow each other hand on, see `begin_decoding`.

    Attributes:
      stall: int32 [4]; the first is nonzero if a kernel that waits for words of other blocks gave up, see `stall_reason`. All other
        results then mean nothing, and there is no next step.
      own: what the implementation keeps from step to step; None if nothing.
    """

    stall: jax.Array
    own: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoded:
    """What `decode_layers` gives.

    Attributes:
      logits: float32 [batch, vocab].
      keys, values: the cache of each layer, with the new tokens in it.
      carried: what the next step is given.
    """

    logits: jax.Array
    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    carried: Carried


def decode_layers_reference(
    x: jax.Array,
    layers: Sequence[DecoderLayer],
    norm: Norm | LayerNorm,
    head: PackedProjection,
    keys: tuple[jax.Array, ...],
    values: tuple[jax.Array, ...],
    cos: jax.Array,
    sin: jax.Array,
    start: jax.Array,
    carried: Carried | None = None,
) -> Decoded:
    """One step of decoding, from the embedding of the new tokens to their logits.

    Args:
      x: [batch, 1, width], embedded.
      layers: the decoder.
      norm, head: final norm and output head, one member.
      keys, values: the cache of each layer, [batch, kv_heads, slots, head_dim].
      cos, sin: float32 [batch, 1, head_dim // 2], of the new tokens' positions, as for `attend_cached`; several tables side by
        side where layers name them.
      start: int32 [batch], those positions.
      carried: of the step before, or of `begin_decoding` with these arguments; what a single step needs is made if not given.
    """
    given = x, layers, norm, head, keys, values, cos, sin, start, carried
    return _decode(project_reference, attend_cached_reference, *given)


def _decode(
    product: Any, attention: Any, x: jax.Array, layers: Sequence[DecoderLayer], norm: Norm | LayerNorm,
    head: PackedProjection, keys: tuple[jax.Array, ...], values: tuple[jax.Array, ...],
    cos: jax.Array, sin: jax.Array, start: jax.Array, carried: Carried | None = None,
) -> Decoded:  # fmt: skip
    new_keys, new_values = list(keys), list(values)
    count = 1 + max(layer.rotation for layer in layers)
    tables = list(zip(*(jnp.split(table, count, axis=-1) for table in (cos, sin)), strict=True))
    for index, layer in enumerate(layers):
        with jax.named_scope("qkv"):
            projected = product(x, layer.qkv, norm=layer.input_norm)
        with jax.named_scope("attention"):
            attended, new_keys[index], new_values[index] = attention(
                *projected, keys[index], values[index], *tables[layer.rotation], start, start + 1,
                window=layer.window, q_norm=layer.q_norm, k_norm=layer.k_norm, scale=layer.scale, softcap=layer.softcap,
            )  # fmt: skip
        x = after_attention(product, x, attended, layer)
    with jax.named_scope("head"):
        (logits,) = product(x[:, -1], head, dtype=jnp.float32, norm=norm)
    return Decoded(logits, tuple(new_keys), tuple(new_values), newly_carried() if carried is None else carried)


def _with_ops(*args: Any, carried: Carried | None = None) -> Decoded:
    return _decode(project, attend_cached, *args, carried=carried)


def newly_carried(own: Any = None) -> Carried:
    """What a first step is given: no stall, and what the implementation keeps."""
    return Carried(jnp.zeros((STALL_INTEGERS,), jnp.int32), own)


def begin_decoding(*arguments: Any) -> tuple[Carried, tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """What the first of several steps is given, by the implementation that serves them, and the caches that it is to be given.

    Arguments are those of the first step. The others must be of the same shapes, with the same weights, in the same program as
    this: an implementation may keep where they are. So weights must be arguments of that program: of its constants XLA makes one
    more for each loop.
    """
    begin = decode_layers.choose(*arguments)[0].begin
    keys, values = arguments[4:6]
    return (newly_carried(), keys, values) if begin is None else begin(*arguments)


decode_layers = Op("decode_layers", decode_layers_reference)
decode_layers.register(Implementation("products", _with_ops))
