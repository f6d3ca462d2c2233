"""Ranks, sizes and memory of a converted model, from its file headers alone: no weight is read."""

from collections.abc import Collection
from pathlib import Path

import jax
import jax.numpy as jnp

from flashsvd_jax.any_config import AnyConfig
from flashsvd_jax.checkpoint.reader import ModelFolder, open_folder
from flashsvd_jax.config import ModelConfig
from flashsvd_jax.encoder_config import EncoderConfig
from flashsvd_jax.errors import RequestError
from flashsvd_jax.hub import resolve_model
from flashsvd_jax.inspection_result import Expansion, Inspection, SiteInfo
from flashsvd_jax.kv_cache import CACHE_UNIT, cache_bytes
from flashsvd_jax.model import DEFAULT_MAX_LENGTH
from flashsvd_jax.models.absorption import weights_for_decoding
from flashsvd_jax.models.decoder import decode_kernel
from flashsvd_jax.models.encoder import pass_kernels
from flashsvd_jax.models.encoder_weights import EncoderWeights, build_encoder_weights
from flashsvd_jax.models.expansion import expanded_sets
from flashsvd_jax.models.weights import DecoderWeights, build_weights
from flashsvd_jax.schema import schema, sites
from pallas_kernels import hardware_rank
from pallas_kernels.registry import Record


def inspect(
    path_or_hub_id: str | Path, *, context: int | None = None, batch: int = 1, materialize: str = "auto"
) -> Inspection:
    """Reads what a converted model's folder says about itself.

    Args:
      path_or_hub_id: a folder that `convert` wrote, or the hub id of one.
      context: length in tokens to give memory and traffic for; by default what `load` makes room for.
      batch: sequences computed together, likewise.
      materialize: which sites are expanded, as for `load`.

    Raises:
      FlashSVDError: the folder is missing, damaged, or not a converted model; a context beyond the model's limit.
    """
    with open_folder(resolve_model(path_or_hub_id)) as folder:
        config = folder.config
        context = min(config.max_position, DEFAULT_MAX_LENGTH) if context is None else context
        if not 1 <= context <= config.max_position:
            raise RequestError(f"context must be from 1 to {config.max_position}, the model's limit, not {context}")
        if batch < 1:
            raise RequestError(f"batch must be at least 1, not {batch}")
        return _inspect(folder, context, batch, materialize)


def _inspect(folder: ModelFolder, context: int, batch: int, materialize: str) -> Inspection:
    config, manifest = folder.config, folder.manifest
    itemsize = jnp.dtype(manifest.dtype).itemsize
    expansions = tuple(
        Expansion(found.sites, found.factors * itemsize, found.dense * itemsize)
        for found in expanded_sets(config, materialize, hardware_rank)
    )
    expanded = {name for expansion in expansions for name in expansion.sites}
    weights, held = _on_device(config, manifest.dtype, expanded)
    cache, step, dense_step, kernel = None, None, None, (None, {}, None)
    if isinstance(config, ModelConfig) and isinstance(weights, DecoderWeights):
        cache = cache_bytes(config, batch, context, itemsize)
        step = _read_by_a_step(weights) + cache
        dense, _ = _on_device(config.dense(), manifest.dtype)
        dense_step = _read_by_a_step(dense) + cache
        slots = -(-context // CACHE_UNIT) * CACHE_UNIT
        kernel = decode_kernel(config, weights_for_decoding(config, weights, batch, slots), batch, slots)
    passes: Record = {}
    if isinstance(config, EncoderConfig) and isinstance(weights, EncoderWeights):
        passes = pass_kernels(config, weights, batch, context)
    return Inspection(
        path=str(folder.path),
        model_type=config.model_type,
        family=manifest.family,
        base_model=manifest.base_model,
        dtype=manifest.dtype,
        sources=manifest.sources,
        notes=manifest.notes,
        num_layers=config.num_layers,
        sites=_site_infos(config, expanded),
        materialize=materialize,
        expansions=expansions,
        params=manifest.params,
        params_dense=manifest.params_dense,
        disk_bytes=sum(file.stat().st_size for file in folder.path.glob("*.safetensors")),
        batch=batch,
        context=context,
        weight_bytes=held * itemsize,
        cache_bytes=cache,
        bytes_per_step=step,
        dense_bytes_per_step=dense_step,
        decode_kernel=kernel[0],
        decode_refusals=kernel[1],
        decode_workspace=kernel[2],
        pass_kernels={op: {name: tuple(sorted(why)) for name, why in used.items()} for op, used in passes.items()},
    )


def _site_infos(config: AnyConfig, expanded: Collection[str]) -> tuple[SiteInfo, ...]:
    owners, groups = config.factorization.owner_by_name, config.factorization.groups_by_site
    found = []
    for site in sites(config):
        rank = config.factorization.rank(site.name)
        number = groups.get(site.name, 1)
        kept = 1.0 if rank is None else rank * (site.d_out + number * site.d_in) / (site.d_out * site.d_in)
        borrowed = tuple(part for part in ("weight", "down", "up", "bias") if f"{site.name}.{part}" in owners)
        found.append(SiteInfo(site.name, site.d_out, site.d_in, rank, number, kept, borrowed, site.name in expanded))
    return tuple(found)


def _on_device(
    config: AnyConfig, dtype: str, expanded: Collection[str] = ()
) -> tuple[DecoderWeights | EncoderWeights, int]:
    """The weights as `load` makes them, shapes in place of arrays, and how many numbers they hold, shared ones once."""
    owners, held = config.factorization.owner_by_name, 0

    def place(array: jax.Array) -> jax.Array:
        nonlocal held
        held += array.size
        return array

    def build(stored: dict[str, jax.Array]) -> DecoderWeights | EncoderWeights:
        def get(name: str) -> jax.Array:
            return stored[owners.get(name, name)]

        if isinstance(config, ModelConfig):
            return build_weights(config, get, hardware_rank, place, expanded)
        return build_encoder_weights(config, get, hardware_rank, place, expanded)

    specs = {name: jax.ShapeDtypeStruct(spec.shape, dtype) for name, spec in schema(config).items()}
    weights = jax.eval_shape(build, specs)
    return weights, held


def _read_by_a_step(weights: DecoderWeights | EncoderWeights) -> int:
    """Bytes, an array counted as often as it is read."""
    assert isinstance(weights, DecoderWeights)
    return sum(array.size * array.dtype.itemsize for array in weights.read_by_a_step())
