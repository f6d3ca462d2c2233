"""A decoder's weights as the forward pass reads them: one entry a layer, projections of the same input packed together."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
from jax.typing import DTypeLike

from flashsvd_jax.config import ModelConfig
from flashsvd_jax.decoder_schema import block_norms, first_projections, qkv_widths
from flashsvd_jax.models.packing import Packer
from flashsvd_jax.schema import flatten
from pallas_kernels import LayerNorm, Norm, PackedProjection


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerWeights:
    """One transformer block. ``gate_up`` holds the gate where there is one; for ``o_gate_up`` see `pallas_kernels.DecoderLayer`."""

    input_norm: Norm | LayerNorm
    qkv: PackedProjection
    q_norm: Norm | None
    k_norm: Norm | None
    o: PackedProjection
    attention_out_norm: Norm | LayerNorm | None
    mlp_norm: Norm | LayerNorm
    gate_up: PackedProjection
    down: PackedProjection
    mlp_out_norm: Norm | LayerNorm | None
    o_gate_up: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecoderWeights:
    """A whole decoder. ``head`` is None where the embedding serves as the output head too."""

    embedding: jax.Array  # [vocab, embed]
    positions: jax.Array | None  # [positions, embed]
    layers: tuple[LayerWeights, ...]
    norm: Norm | LayerNorm
    head: PackedProjection | None

    def read_by_a_step(self) -> list[jax.Array]:
        """The arrays that decoding a token reads: all but tables of which single rows are read, such as an embedding that is
        not the head too."""
        rest = dataclasses.replace(self, positions=None)
        return jax.tree.leaves(rest if self.head is None else dataclasses.replace(rest, embedding=None))


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
        positions=packer.array("embed_positions.weight") if config.learned_positions else None,
        layers=tuple(layer_weights(config, packer, index) for index in range(config.num_layers)),
        norm=_norm(config, packer, "norm"),
        head=None if config.tie_embeddings else packer.group(False, ("lm_head",)),
    )


def layer_weights(config: ModelConfig, packer: Packer, index: int) -> LayerWeights:
    """One layer, as ``packer`` gives its arrays."""
    block, attn, mlp = (f"layers_{index}{part}" for part in ("", ".self_attn", ".mlp"))
    input_norm, *others = (_norm(config, packer, f"{block}.{name}") for name in block_norms(config))
    attention_out, mlp_norm, mlp_out = others if config.output_norms else (None, *others, None)
    qkv, inner = first_projections(config)
    halves = (config.intermediate_size,) * (2 if config.gated else 1)
    return LayerWeights(
        input_norm=input_norm,
        qkv=packer.group(
            config.qkv_bias, tuple(f"{attn}.{name}" for name in qkv), qkv_widths(config) if len(qkv) == 1 else ()
        ),
        q_norm=_rms_norm(config, packer, f"{attn}.q_norm") if config.qk_norm else None,
        k_norm=_rms_norm(config, packer, f"{attn}.k_norm") if config.qk_norm else None,
        o=packer.group(config.o_bias, (f"{attn}.o_proj",)),
        attention_out_norm=attention_out,
        mlp_norm=mlp_norm,
        gate_up=packer.group(
            config.mlp_bias, tuple(f"{mlp}.{name}" for name in inner), halves if len(inner) == 1 else ()
        ),
        down=packer.group(config.mlp_bias, (f"{mlp}.down_proj",)),
        mlp_out_norm=mlp_out,
    )


def weights_from_params(config: ModelConfig, params: Mapping[str, Any]) -> DecoderWeights:
    """Weights from a canonical parameter tree ``{"params": ...}``: unpadded, and factors stay factors, so that gradients
    reach them."""
    return build_weights(config, flatten(params).__getitem__)


def _norm(config: ModelConfig, packer: Packer, name: str) -> Norm | LayerNorm:
    if not config.layer_norm:
        return _rms_norm(config, packer, name)
    return LayerNorm(packer.array(f"{name}.scale"), packer.array(f"{name}.bias"), config.norm_eps)


def _rms_norm(config: ModelConfig, packer: Packer, name: str) -> Norm:
    return Norm(packer.array(f"{name}.scale"), config.norm_eps, config.norm_offset)
