"""Ranks, sizes and memory of a converted model, from its file headers alone: no weight is read."""

import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp

from flashsvd_jax.any_config import AnyConfig
from flashsvd_jax.checkpoint.manifest import SourceFile
from flashsvd_jax.checkpoint.reader import ModelFolder, open_folder
from flashsvd_jax.config import ModelConfig
from flashsvd_jax.encoder_config import EncoderConfig
from flashsvd_jax.engine import CACHE_UNIT
from flashsvd_jax.errors import RequestError
from flashsvd_jax.hub import resolve_model
from flashsvd_jax.inspection_text import describe
from flashsvd_jax.kv_cache import cache_bytes
from flashsvd_jax.model import DEFAULT_MAX_LENGTH
from flashsvd_jax.models.decoder import decode_kernel
from flashsvd_jax.models.encoder import pass_kernels
from flashsvd_jax.models.encoder_weights import EncoderWeights, build_encoder_weights
from flashsvd_jax.models.expansion import expanded_sets
from flashsvd_jax.models.weights import DecoderWeights, build_weights
from flashsvd_jax.schema import schema, sites
from pallas_kernels import hardware_rank
from pallas_kernels.registry import Record


@dataclasses.dataclass(frozen=True)
class SiteInfo:
    """One projection.

    Attributes:
      name: its path, such as ``layers_0.self_attn.q_proj``.
      d_out, d_in: shape of the weight it stands for.
      rank: as stored, that of each group; None where it is dense.
      groups: groups of outputs with factors of their own, such as heads; 1 for most.
      kept: numbers in its factors as a share of those in the weight, shared ones included; 1 where it is dense.
      borrowed: those of its arrays that another site stores, such as ``("down",)``.
      expanded: whether `load` turns it into a dense weight.
    """

    name: str
    d_out: int
    d_in: int
    rank: int | None
    groups: int
    kept: float
    borrowed: tuple[str, ...]
    expanded: bool

    @property
    def exceeds_dense(self) -> bool:
        """Whether the factors hold more than the weight would: the rank is above break-even."""
        return self.kept > 1


@dataclasses.dataclass(frozen=True)
class Expansion:
    """Sites that `load` turns into dense weights together: one, or several that share a first factor.

    Attributes:
      sites: their names.
      factor_bytes: of their factors, ranks as padded, a shared factor once.
      dense_bytes: of the weights in their place.
    """

    sites: tuple[str, ...]
    factor_bytes: int
    dense_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspection:
    """What `inspect` finds; as text, a table. Sizes are in bytes.

    Attributes:
      path, model_type, family, base_model, dtype, sources, notes: where the model comes from.
      num_layers: number of transformer blocks.
      sites: every projection.
      materialize: what `load` is taken to be asked for; expansions: what it expands then.
      params: numbers stored; params_dense: numbers of the same model with no site factorized.
      disk_bytes: of the weight files.
      batch, context: sequences computed together, and their length, that the next four are for.
      weight_bytes: of the weights on the device, where ranks are padded and some sites expanded.
      cache_bytes: of the keys and values; None for an encoder, as are the next two.
      bytes_per_step: read to decode one token for every sequence, when all of the context is in use.
      dense_bytes_per_step: the same for the model with no site factorized.
      decode_kernel: implementation of a decode step on this machine; decode_refusals: others, and why they do not serve it.
      decode_workspace: device memory that a step takes beside weights and cache; None where nobody has counted it.
      pass_kernels: of an encoder's pass on this machine: operation -> implementation -> others, and why they do not serve it.
    """

    path: str
    model_type: str
    family: str
    base_model: str | None
    dtype: str
    sources: tuple[SourceFile, ...]
    notes: tuple[str, ...]
    num_layers: int
    sites: tuple[SiteInfo, ...]
    materialize: str
    expansions: tuple[Expansion, ...]
    params: int
    params_dense: int
    disk_bytes: int
    batch: int
    context: int
    weight_bytes: int
    cache_bytes: int | None
    bytes_per_step: int | None
    dense_bytes_per_step: int | None
    decode_kernel: str | None
    decode_refusals: Mapping[str, str]
    decode_workspace: int | None
    pass_kernels: Mapping[str, Mapping[str, tuple[str, ...]]]

    @property
    def projections(self) -> dict[str, str]:
        """The projections of a layer: short name -> path in the layer, such as ``self_attn.q_proj``."""
        paths = [site.name.removeprefix("layers_0.") for site in self.sites if site.name.startswith("layers_0.")]
        return {path.rpartition(".")[2].removesuffix("_proj"): path for path in paths}

    def site(self, name: str) -> SiteInfo | None:
        """The site of that name, if the model has it."""
        return next((site for site in self.sites if site.name == name), None)

    def to_json(self) -> str:
        """All fields as a JSON object."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    def __str__(self) -> str:
        return describe(self)


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
        kernel = decode_kernel(config, weights, batch, -(-context // CACHE_UNIT) * CACHE_UNIT)
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
