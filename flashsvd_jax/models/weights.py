"""A decoder's weights as the forward pass reads them: one entry a layer, projections of the same input packed together."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from flashsvd_jax.config import ModelConfig
from flashsvd_jax.schema import flatten
from pallas_kernels import PackedProjection, Projection, pack

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


def packed_sites(config: ModelConfig) -> list[tuple[str, ...]]:
    """The sites of every packed group, in the order they are computed."""
    groups = [_in_layer(layer, paths) for layer in range(config.num_layers) for paths in (_QKV, _O, _GATE_UP, _DOWN)]
    return groups if config.tie_embeddings else [*groups, ("lm_head",)]


def first_parts(config: ModelConfig, group: tuple[str, ...], low_rank: Collection[str]) -> tuple[str, ...]:
    """Names of the arrays that a packed group's first matrix is made of; groups where they are the same hold it in common.

    ``low_rank`` are the sites that are kept as factors. Dense weights are never held in common.
    """
    owners = config.factorization.owner_by_name
    return tuple(owners.get(f"{s}.down", f"{s}.down") if s in low_rank else f"{s}.weight" for s in group)


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
    packer = _Packer(config, get, pad_rank, place, expand, dtype)

    def layer(index: int) -> LayerWeights:
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

    return DecoderWeights(
        embedding=packer.array("embed_tokens.weight"),
        layers=tuple(layer(index) for index in range(config.num_layers)),
        norm=packer.array("norm.scale"),
        head=None if config.tie_embeddings else packer.group(False, ("lm_head",)),
    )


def weights_from_params(config: ModelConfig, params: Mapping[str, Any]) -> DecoderWeights:
    """Weights from a canonical parameter tree ``{"params": ...}``: unpadded, and factors stay factors, so that gradients
    reach them."""
    return build_weights(config, flatten(params).__getitem__)


class _Packer:
    """Makes packed groups one at a time; the arguments are those of `build_weights`."""

    def __init__(
        self,
        config: ModelConfig,
        get: Callable[[str], Any],
        pad_rank: Callable[[int], int],
        place: Callable[[Any], Any],
        expand: Collection[str],
        dtype: DTypeLike | None,
    ):
        self._config, self._get, self._pad_rank, self._place, self._dtype = config, get, pad_rank, place, dtype
        self._owners = config.factorization.owner_by_name
        self._stored_ranks = config.factorization.rank_by_site
        self._low_rank = self._stored_ranks.keys() - set(expand)
        self._shared_firsts: dict[tuple[str, ...], Any] = {}

    def array(self, name: str) -> Any:
        """An array of no projection."""
        return self._place(self._cast(self._get(name)))

    def group(self, has_bias: bool, sites: tuple[str, ...]) -> PackedProjection:
        """The packed projections of one input."""
        downs: dict[str, Any] = {}
        packed = pack([self._projection(site, has_bias, downs) for site in sites], self._pad_rank)
        place = self._place
        return dataclasses.replace(
            packed,
            first=self._place_once(packed.first, sites),
            ups=tuple(None if up is None else place(up) for up in packed.ups),
            biases=tuple(None if bias is None else place(bias) for bias in packed.biases),
        )

    def _projection(self, site: str, has_bias: bool, downs: dict[str, Any]) -> Projection:
        """One site. ``downs`` holds the group's first factors by owner: `pack` must see a shared one as one object, cast or not."""
        bias = self._cast(self._get(f"{site}.bias")) if has_bias else None
        if site not in self._stored_ranks:
            return Projection(weight=self._cast(self._get(f"{site}.weight")), bias=bias)
        name = f"{site}.down"
        if site not in self._low_rank:
            return Projection(weight=self._expanded(self._get(name), self._get(f"{site}.up")), bias=bias)
        down = downs.setdefault(self._owners.get(name, name), self._cast(self._get(name)))
        return Projection(down=down, up=self._cast(self._get(f"{site}.up")), bias=bias)

    def _expanded(self, down: Any, up: Any) -> jax.Array:
        # Padding leaves few different ranks, so that few shapes are compiled for a model with a rank of its own for each site.
        padded = pack([Projection(down=down, up=up)], self._pad_rank)
        return _product(padded.ups[0], padded.first, down.dtype if self._dtype is None else jnp.dtype(self._dtype))

    def _cast(self, array: Any) -> Any:
        return array if self._dtype is None else array.astype(self._dtype, copy=False)

    def _place_once(self, first: Any, sites: tuple[str, ...]) -> Any:
        """Layers that share all their first factors (a cross-layer basis) share the packed array too."""
        parts = first_parts(self._config, sites, self._low_rank)
        if not any(part in self._owners.values() for part in parts):
            return self._place(first)
        if parts not in self._shared_firsts:
            self._shared_firsts[parts] = self._place(first)
        return self._shared_firsts[parts]


def _in_layer(index: int, paths: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"layers_{index}.{path}" for path in paths)


@functools.partial(jax.jit, static_argnums=2)
def _product(up: jax.Array, down: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """up [d_out, rank] times down [rank, d_in], in float32 whatever the device would take for that by itself."""
    wide = jnp.matmul(up.astype(jnp.float32), down.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return wide.astype(dtype)
