"""Every parameter of a model by name, shape and meaning of its axes, from the configuration alone.

Loading, validation, conversion, `inspect` and memory estimates all read this; nothing else lists parameters.
Weights keep PyTorch's orientation, [d_out, d_in], so no tensor is transposed between a checkpoint and the device, and the axis
that a product contracts over is contiguous in memory.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from flashsvd_jax.any_config import AnyConfig
from flashsvd_jax.decoder_schema import decoder_params, decoder_sites
from flashsvd_jax.encoder_config import EncoderConfig
from flashsvd_jax.encoder_schema import encoder_params, encoder_sites
from flashsvd_jax.errors import CheckpointError
from flashsvd_jax.param_specs import ParamSpec as ParamSpec
from flashsvd_jax.param_specs import Site as Site


def sites(config: AnyConfig) -> list[Site]:
    """Every projection of the model, in the order it is computed."""
    return encoder_sites(config) if isinstance(config, EncoderConfig) else decoder_sites(config)


def params_of_no_site(config: AnyConfig) -> dict[str, ParamSpec]:
    """Embeddings, norms and the like: the parameters that belong to no projection, by name."""
    return encoder_params(config) if isinstance(config, EncoderConfig) else decoder_params(config)


def schema(config: AnyConfig) -> dict[str, ParamSpec]:
    """Flat name -> shape of every parameter, those that share an array included.

    Raises:
      CheckpointError: the factorization names a site that the model does not have, or groups that do not divide it.
    """
    ranks, by_layer = config.factorization.rank_by_site, sites(config)
    groups = config.factorization.groups_by_site
    unknown = groups.keys() - {site.name for site in by_layer}
    if unknown:
        raise CheckpointError(f"the factorization names sites the model does not have: {', '.join(sorted(unknown))}")
    if dense := groups.keys() - ranks.keys():
        raise CheckpointError(f"the factorization groups the outputs of dense sites: {', '.join(sorted(dense))}")
    specs = params_of_no_site(config)
    for site in by_layer:
        number = groups.get(site.name, 1)
        if site.d_out % number:
            raise CheckpointError(f"{site.name} has {site.d_out} outputs, which do not form {number} equal groups")
        specs |= site.params(ranks.get(site.name), number)
    return specs


def stored_names(config: AnyConfig) -> list[str]:
    """Names that have an array of their own; the others are aliases of one of these."""
    aliases = config.factorization.owner_by_name
    return [name for name in schema(config) if name not in aliases]


def abstract_params(config: AnyConfig, dtype: Any = jnp.bfloat16) -> dict[str, Any]:
    """The parameter tree ``{"params": ...}`` with shapes and dtypes in place of arrays."""
    return nest({name: jax.ShapeDtypeStruct(spec.shape, dtype) for name, spec in schema(config).items()})


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Flat dotted names -> ``{"params": nested dictionary}``."""
    return {"params": traverse_util.unflatten_dict(dict(flat), sep=".")}


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """``{"params": nested dictionary}`` -> flat dotted names."""
    return traverse_util.flatten_dict(dict(params["params"]), sep=".")


def mismatches(config: AnyConfig, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """What is wrong with a set of named shapes, one sentence each: missing, unexpected and mis-shaped parameters."""
    specs = schema(config)
    for name in sorted(specs.keys() - shapes.keys()):
        yield f"missing: {name} {list(specs[name].shape)}"
    for name in sorted(shapes.keys() - specs.keys()):
        yield f"unexpected: {name} {list(shapes[name])}"
    for name in sorted(specs.keys() & shapes.keys()):
        if tuple(shapes[name]) != specs[name].shape:
            yield f"mis-shaped: {name} is {list(shapes[name])}, the configuration makes it {list(specs[name].shape)}"


def check_shapes(config: AnyConfig, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raises CheckpointError with every mismatch in one message, if there is any."""
    found = list(mismatches(config, shapes))
    if found:
        raise CheckpointError(f"{where} does not hold this model, {len(found)} problems:\n  " + "\n  ".join(found))


def count_params(config: AnyConfig) -> int:
    """Number of stored parameters, arrays that are shared counted once."""
    specs = schema(config)
    return sum(specs[name].size for name in stored_names(config))
