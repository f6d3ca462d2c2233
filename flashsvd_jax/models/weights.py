"""A decoder's weights as the forward pass reads them: one entry a layer, projections of the same input packed together."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
from jax.typing import DTypeLike

from flashsvd_jax.config import ModelConfig
from flashsvd_jax.models.packing import Packer
from flashsvd_jax.schema import flatten
from pallas_kernels import PackedProjection

# Projections of one input, which are packed together.
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_O = ("self_attn.o_proj",)
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_DOWN = ("mlp.down_proj",)


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

    def read_by_a_step(self) -> list[jax.Array]:
        """The arrays that decoding a token reads: all, but of an embedding that is not the head too only single rows."""
        rest = self if self.head is None else dataclasses.replace(self, embedding=None)
        return jax.tree.leaves(rest)


def build_weights(
    config: ModelConfig,
    get: Callable[[str], Any],
    pad_rank: Callable[[int], int] = lambda rank: rank,
    place: Callable[[Any], Any] = lambda array: array,
    expand: Collection[str] = (),
    dtype: DTypeLike | None = None,
) -> DecoderWeights:
    """Packs a model's arrays for the forward pass, asking for each by its flat name, layer by layer.

    Args:
      config: the model.
      get: flat name -> array; an array that several sites share must be the same object each time.
      pad_rank: rank -> the rank it is padded to with zeros, such as `pallas_kernels.hardware_rank`.
      place: applied to each finished array before the next group is asked for, so that a loader can stream to the device.
      expand: low-rank sites to turn into dense weights, see `flashsvd_jax.models.expansion`. The products are computed on the
        default device, in float32 from the factors as ``get`` gives them, and rounded once.
      dtype: of all arrays; as ``get`` gives them if None.
    """
    packer = Packer(config, get, pad_rank, place, expand, dtype)
    return DecoderWeights(
        embedding=packer.array("embed_tokens.weight"),
        layers=tuple(layer_weights(config, packer, index) for index in range(config.num_layers)),
        norm=packer.array("norm.scale"),
        head=None if config.tie_embeddings else packer.group(False, ("lm_head",)),
    )


def layer_weights(config: ModelConfig, packer: Packer, index: int) -> LayerWeights:
    """One layer, as ``packer`` gives its arrays."""
    prefix = f"layers_{index}"
    attn = f"{prefix}.self_attn"
    return LayerWeights(
        input_norm=packer.array(f"{prefix}.input_layernorm.scale"),
        qkv=packer.group(config.qkv_bias, _in_layer(index, _QKV)),
        q_norm=packer.array(f"{attn}.q_norm.scale") if config.qk_norm else None,
        k_norm=packer.array(f"{attn}.k_norm.scale") if config.qk_norm else None,
        o=packer.group(config.o_bias, _in_layer(index, _O)),
        post_attention_norm=packer.array(f"{prefix}.post_attention_layernorm.scale"),
        gate_up=packer.group(config.mlp_bias, _in_layer(index, _GATE_UP)),
        down=packer.group(config.mlp_bias, _in_layer(index, _DOWN)),
    )


def weights_from_params(config: ModelConfig, params: Mapping[str, Any]) -> DecoderWeights:
    """Weights from a canonical parameter tree ``{"params": ...}``: unpadded, and factors stay factors, so that gradients
    reach them."""
    return build_weights(config, flatten(params).__getitem__)


def _in_layer(index: int, paths: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"layers_{index}.{path}" for path in paths)
