"""An encoder's weights as the forward pass reads them: one entry a layer, projections of the same input packed together."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
from jax.typing import DTypeLike

from flashsvd_jax.encoder_config import EncoderConfig
from flashsvd_jax.encoder_schema import has_attention_norm
from flashsvd_jax.models.packing import Packer
from flashsvd_jax.schema import flatten
from pallas_kernels import LayerNorm, PackedProjection


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EncoderLayerWeights:
    """One transformer block. ``up`` holds the gate too where there is one."""

    attention_norm: LayerNorm | None
    qkv: PackedProjection
    o: PackedProjection
    mlp_norm: LayerNorm
    up: PackedProjection
    down: PackedProjection


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HeadWeights:
    """What stands on an encoder. Where the embedding serves as the output layer, ``out`` is None and ``out_bias`` its bias."""

    dense: PackedProjection
    norm: LayerNorm | None
    out: PackedProjection | None
    out_bias: jax.Array | None  # [outputs]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EncoderWeights:
    """A whole encoder."""

    tokens: jax.Array  # [vocab, embed]
    positions: jax.Array | None  # [positions, embed]
    types: jax.Array | None  # [types, embed]
    embed_norm: LayerNorm
    layers: tuple[EncoderLayerWeights, ...]
    norm: LayerNorm | None
    head: HeadWeights | None


def build_encoder_weights(
    config: EncoderConfig,
    get: Callable[[str], Any],
    pad_rank: Callable[[int], int] = lambda rank: rank,
    place: Callable[[Any], Any] = lambda array: array,
    expand: Collection[str] = (),
    dtype: DTypeLike | None = None,
) -> EncoderWeights:
    """Packs an encoder's arrays for the forward pass; arguments as for `flashsvd_jax.models.weights.build_weights`."""
    packer = Packer(config, get, pad_rank, place, expand, dtype)
    norm = _Norms(config, packer)
    return EncoderWeights(
        tokens=packer.array("embed_tokens.weight"),
        positions=packer.array("embed_positions.weight") if config.learned_positions else None,
        types=packer.array("embed_types.weight") if config.num_types else None,
        embed_norm=norm("embed_norm"),
        layers=tuple(encoder_layer_weights(config, packer, index) for index in range(config.num_layers)),
        norm=norm("norm") if config.final_norm else None,
        head=_head(config, packer, norm),
    )


def encoder_layer_weights(config: EncoderConfig, packer: Packer, index: int) -> EncoderLayerWeights:
    """One layer, as ``packer`` gives its arrays."""
    norm, d = _Norms(config, packer), config.hidden_size
    block, attention, mlp = (f"layers_{index}{part}" for part in ("", ".self_attn", ".mlp"))
    qkv = ("qkv",) if config.fused else ("q", "k", "v")
    inner = f"{mlp}.gate_up_proj" if config.gated else f"{mlp}.up_proj"
    return EncoderLayerWeights(
        attention_norm=norm(f"{block}.self_attn_norm") if has_attention_norm(config, index) else None,
        qkv=packer.group(
            config.attention_bias, tuple(f"{attention}.{n}_proj" for n in qkv), (d,) * 3 if config.fused else ()
        ),
        o=packer.group(config.attention_bias, (f"{attention}.o_proj",)),
        mlp_norm=norm(f"{block}.mlp_norm"),
        up=packer.group(config.mlp_bias, (inner,), (config.intermediate_size,) * 2 if config.gated else ()),
        down=packer.group(config.mlp_bias, (f"{mlp}.down_proj",)),
    )


def encoder_weights_from_params(config: EncoderConfig, params: Mapping[str, Any]) -> EncoderWeights:
    """Weights from a canonical parameter tree ``{"params": ...}``: unpadded, and factors stay factors."""
    return build_encoder_weights(config, flatten(params).__getitem__)


class _Norms:
    """Gives norms by name."""

    def __init__(self, config: EncoderConfig, packer: Packer):
        self._config, self._packer = config, packer

    def __call__(self, name: str) -> LayerNorm:
        bias = self._packer.array(f"{name}.bias") if self._config.norm_bias else None
        return LayerNorm(self._packer.array(f"{name}.scale"), bias, self._config.norm_eps)


def _head(config: EncoderConfig, packer: Packer, norm: _Norms) -> HeadWeights | None:
    head = config.head
    if head is None:
        return None
    return HeadWeights(
        dense=packer.group(head.dense_bias, ("head.dense",)),
        norm=norm("head.norm") if head.has_norm else None,
        out=None if head.tied else packer.group(head.out_bias, ("head.out",)),
        out_bias=packer.array("head.out.bias") if head.tied and head.out_bias else None,
    )
