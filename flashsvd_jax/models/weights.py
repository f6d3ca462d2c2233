"""A decoder's weights as the forward pass reads them: one entry a layer, projections of the same input packed together."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from flashsvd_jax.config import ModelConfig
from flashsvd_jax.schema import flatten
from pallas_kernels import PackedProjection, Projection, pack


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerWeights:
    """One transformer block."""

    input_norm: jax.Array  # [embed]
    qkv: PackedProjection
    q_norm: jax.Array | None  # [head_dim]
    k_norm: jax.Array | None  # [head_dim]
    o: PackedProjection
    post_attention_norm: jax.Array  # [embed]
    gate_up: PackedProjection
    down: PackedProjection


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecoderWeights:
    """A whole decoder. ``head`` is None where the embedding serves as the output head too."""

    embedding: jax.Array  # [vocab, embed]
    layers: tuple[LayerWeights, ...]
    norm: jax.Array  # [embed]
    head: PackedProjection | None


def build_weights(
    config: ModelConfig,
    get: Callable[[str], Any],
    pad_rank: Callable[[int], int] = lambda rank: rank,
    place: Callable[[Any], Any] = lambda array: array,
) -> DecoderWeights:
    """Packs a model's arrays for the forward pass, asking for each by its flat name, layer by layer.

    Args:
      config: the model.
      get: flat name -> array; an array that several sites share must be the same object each time.
      pad_rank: rank -> the rank it is padded to with zeros, such as `pallas_kernels.hardware_rank`.
      place: applied to each finished array before the next group is asked for, so that a loader can stream to the device.
    """
    ranks, owners = config.factorization.rank_by_site, config.factorization.owner_by_name
    shared_firsts: dict[tuple[str, ...], Any] = {}

    def projection(site: str, has_bias: bool) -> Projection:
        bias = get(f"{site}.bias") if has_bias else None
        if site in ranks:
            return Projection(down=get(f"{site}.down"), up=get(f"{site}.up"), bias=bias)
        return Projection(weight=get(f"{site}.weight"), bias=bias)

    def place_once(first: Any, site_names: list[str]) -> Any:
        """Layers that share all their first factors (a cross-layer basis) share the packed array too."""
        downs = [f"{site}.down" for site in site_names]
        if not any(down in owners or down in owners.values() for down in downs):
            return place(first)
        key = tuple(owners.get(down, down) for down in downs)
        if key not in shared_firsts:
            shared_firsts[key] = place(first)
        return shared_firsts[key]

    def group(has_bias: bool, *site_names: str) -> PackedProjection:
        packed = pack([projection(site, has_bias) for site in site_names], pad_rank)
        return dataclasses.replace(
            packed,
            first=place_once(packed.first, list(site_names)),
            ups=tuple(None if up is None else place(up) for up in packed.ups),
            biases=tuple(None if bias is None else place(bias) for bias in packed.biases),
        )

    def vector(name: str) -> jax.Array:
        return place(get(f"{name}.scale"))

    def layer(index: int) -> LayerWeights:
        prefix = f"layers_{index}"
        attn, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        return LayerWeights(
            input_norm=vector(f"{prefix}.input_layernorm"),
            qkv=group(config.qkv_bias, f"{attn}.q_proj", f"{attn}.k_proj", f"{attn}.v_proj"),
            q_norm=vector(f"{attn}.q_norm") if config.qk_norm else None,
            k_norm=vector(f"{attn}.k_norm") if config.qk_norm else None,
            o=group(config.o_bias, f"{attn}.o_proj"),
            post_attention_norm=vector(f"{prefix}.post_attention_layernorm"),
            gate_up=group(config.mlp_bias, f"{mlp}.gate_proj", f"{mlp}.up_proj"),
            down=group(config.mlp_bias, f"{mlp}.down_proj"),
        )

    return DecoderWeights(
        embedding=place(get("embed_tokens.weight")),
        layers=tuple(layer(index) for index in range(config.num_layers)),
        norm=vector("norm"),
        head=None if config.tie_embeddings else group(False, "lm_head"),
    )


def weights_from_params(config: ModelConfig, params: Mapping[str, Any]) -> DecoderWeights:
    """Weights from a canonical parameter tree ``{"params": ...}``, unpadded."""
    return build_weights(config, flatten(params).__getitem__)
