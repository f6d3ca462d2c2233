"""Every parameter of a model by name, shape and meaning of its axes, from the configuration alone.

Loading, validation, conversion, `inspect` and memory estimates all read this; nothing else lists parameters.
Weights keep PyTorch's orientation, [d_out, d_in], so no tensor is transposed between a checkpoint and the device, and the axis
that a product contracts over is contiguous in memory.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from flashsvd_jax.config import ModelConfig
from flashsvd_jax.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """Shape of a parameter and the glossary names of its axes (see `flashsvd_jax.axes`)."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Site:
    """A projection that may be factorized: its path in the tree and the shape [d_out, d_in] of the weight it stands for."""

    name: str
    d_out: int
    d_in: int
    out_axis: str
    in_axis: str
    has_bias: bool

    def params(self, rank: int | None) -> dict[str, ParamSpec]:
        """The site's arrays at a rank, or dense for None."""
        if rank is None:
            params = {"weight": ParamSpec((self.d_out, self.d_in), (self.out_axis, self.in_axis))}
        else:
            params = {
                "down": ParamSpec((rank, self.d_in), ("rank", self.in_axis)),
                "up": ParamSpec((self.d_out, rank), (self.out_axis, "rank")),
            }
        if self.has_bias:
            params["bias"] = ParamSpec((self.d_out,), (self.out_axis,))
        return {f"{self.name}.{part}": spec for part, spec in params.items()}


def sites(config: ModelConfig) -> list[Site]:
    """Every projection of the model, in the order it is computed."""
    d, ff = config.hidden_size, config.intermediate_size
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    found = []
    for layer in range(config.num_layers):
        attn, mlp = f"layers_{layer}.self_attn", f"layers_{layer}.mlp"
        found += [
            Site(f"{attn}.q_proj", heads, d, "heads", "embed", config.qkv_bias),
            Site(f"{attn}.k_proj", kv_heads, d, "kv_heads", "embed", config.qkv_bias),
            Site(f"{attn}.v_proj", kv_heads, d, "kv_heads", "embed", config.qkv_bias),
            Site(f"{attn}.o_proj", d, heads, "embed", "heads", config.o_bias),
            Site(f"{mlp}.gate_proj", ff, d, "mlp", "embed", config.mlp_bias),
            Site(f"{mlp}.up_proj", ff, d, "mlp", "embed", config.mlp_bias),
            Site(f"{mlp}.down_proj", d, ff, "embed", "mlp", config.mlp_bias),
        ]
    if not config.tie_embeddings:
        found.append(Site("lm_head", config.vocab_size, d, "vocab", "embed", False))
    return found


def schema(config: ModelConfig) -> dict[str, ParamSpec]:
    """Flat name -> shape of every parameter, those that share an array included.

    Raises:
      CheckpointError: the factorization names a site that the model does not have.
    """
    specs = {"embed_tokens.weight": ParamSpec((config.vocab_size, config.hidden_size), ("vocab", "embed"))}
    ranks, by_layer = config.factorization.rank_by_site, sites(config)
    unknown = ranks.keys() - {site.name for site in by_layer}
    if unknown:
        raise CheckpointError(f"the factorization names sites the model does not have: {', '.join(sorted(unknown))}")
    norm = ParamSpec((config.hidden_size,), ("embed",))
    for layer in range(config.num_layers):
        specs[f"layers_{layer}.input_layernorm.scale"] = norm
        specs[f"layers_{layer}.post_attention_layernorm.scale"] = norm
        if config.qk_norm:
            for name in ("q_norm", "k_norm"):
                specs[f"layers_{layer}.self_attn.{name}.scale"] = ParamSpec((config.head_dim,), ("head_dim",))
    specs["norm.scale"] = norm
    for site in by_layer:
        specs |= site.params(ranks.get(site.name))
    return specs


def stored_names(config: ModelConfig) -> list[str]:
    """Names that have an array of their own; the others are aliases of one of these."""
    aliases = config.factorization.owner_by_name
    return [name for name in schema(config) if name not in aliases]


def abstract_params(config: ModelConfig, dtype: Any = jnp.bfloat16) -> dict[str, Any]:
    """The parameter tree ``{"params": ...}`` with shapes and dtypes in place of arrays."""
    return nest({name: jax.ShapeDtypeStruct(spec.shape, dtype) for name, spec in schema(config).items()})


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Flat dotted names -> ``{"params": nested dictionary}``."""
    return {"params": traverse_util.unflatten_dict(dict(flat), sep=".")}


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """``{"params": nested dictionary}`` -> flat dotted names."""
    return traverse_util.flatten_dict(dict(params["params"]), sep=".")


def mismatches(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """What is wrong with a set of named shapes, one sentence each: missing, unexpected and mis-shaped parameters."""
    specs = schema(config)
    for name in sorted(specs.keys() - shapes.keys()):
        yield f"missing: {name} {list(specs[name].shape)}"
    for name in sorted(shapes.keys() - specs.keys()):
        yield f"unexpected: {name} {list(shapes[name])}"
    for name in sorted(specs.keys() & shapes.keys()):
        if tuple(shapes[name]) != specs[name].shape:
            yield f"mis-shaped: {name} is {list(shapes[name])}, the configuration makes it {list(specs[name].shape)}"


def check_shapes(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raises CheckpointError with every mismatch in one message, if there is any."""
    found = list(mismatches(config, shapes))
    if found:
        raise CheckpointError(f"{where} does not hold this model, {len(found)} problems:\n  " + "\n  ".join(found))


def count_params(config: ModelConfig) -> int:
    """Number of stored parameters, arrays that are shared counted once."""
    specs = schema(config)
    return sum(specs[name].size for name in stored_names(config))
