"""Ranks, sizes and memory of a converted model, from its file headers alone: no weight is read."""

import dataclasses
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp

from flashsvd_jax.checkpoint.manifest import SourceFile
from flashsvd_jax.checkpoint.reader import ModelFolder, open_folder
from flashsvd_jax.config import ModelConfig
from flashsvd_jax.errors import RequestError
from flashsvd_jax.hub import resolve_model
from flashsvd_jax.kv_cache import cache_bytes
from flashsvd_jax.model import DEFAULT_MAX_LENGTH
from flashsvd_jax.models.weights import DecoderWeights, build_weights
from flashsvd_jax.schema import schema, sites
from pallas_kernels import hardware_rank

PROJECTIONS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


@dataclasses.dataclass(frozen=True)
class SiteInfo:
    """One projection.

    Attributes:
      name: its path, such as ``layers_0.self_attn.q_proj``.
      d_out, d_in: shape of the weight it stands for.
      rank: as stored; None where it is dense.
      kept: numbers in its factors as a share of those in the weight, shared ones included; 1 where it is dense.
      borrowed: those of its arrays that another site stores, such as ``("down",)``.
    """

    name: str
    d_out: int
    d_in: int
    rank: int | None
    kept: float
    borrowed: tuple[str, ...]

    @property
    def exceeds_dense(self) -> bool:
        """Whether the factors hold more than the weight would: the rank is above break-even."""
        return self.kept > 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspection:
    """What `inspect` finds; as text, a table. Sizes are in bytes.

    Attributes:
      path, model_type, family, base_model, dtype, sources, notes: where the model comes from.
      num_layers: number of transformer blocks.
      sites: every projection.
      params: numbers stored; params_dense: numbers of the same model with no site factorized.
      disk_bytes: of the weight files.
      batch, context: sequences computed together, and their length, that the next three are for.
      weight_bytes: of the weights on the device, where ranks are padded.
      cache_bytes: of the keys and values.
      bytes_per_step: read to decode one token for every sequence, when all of the context is in use.
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
    params: int
    params_dense: int
    disk_bytes: int
    batch: int
    context: int
    weight_bytes: int
    cache_bytes: int
    bytes_per_step: int

    def site(self, name: str) -> SiteInfo | None:
        """The site of that name, if the model has it."""
        return next((site for site in self.sites if site.name == name), None)

    def to_json(self) -> str:
        """All fields as a JSON object."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    def __str__(self) -> str:
        return "\n".join([*_origin(self), "", *_rank_table(self), "", *_totals(self)])


def inspect(path_or_hub_id: str | Path, *, context: int | None = None, batch: int = 1) -> Inspection:
    """Reads what a converted model's folder says about itself.

    Args:
      path_or_hub_id: a folder that `convert` wrote, or the hub id of one.
      context: length in tokens to give memory and traffic for; by default what `load` makes room for.
      batch: sequences computed together, likewise.

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
        return _inspect(folder, context, batch)


def _inspect(folder: ModelFolder, context: int, batch: int) -> Inspection:
    config, manifest = folder.config, folder.manifest
    itemsize = jnp.dtype(manifest.dtype).itemsize
    weights, held = _device_weights(config)
    cache = cache_bytes(config, batch, context, itemsize)
    read = sum(array.size for array in jax.tree.leaves(weights))
    if weights.head is not None:  # an embedding that is not the head too: only the current tokens' rows are read
        read -= weights.embedding.size
    return Inspection(
        path=str(folder.path),
        model_type=config.model_type,
        family=manifest.family,
        base_model=manifest.base_model,
        dtype=manifest.dtype,
        sources=manifest.sources,
        notes=manifest.notes,
        num_layers=config.num_layers,
        sites=_site_infos(config),
        params=manifest.params,
        params_dense=manifest.params_dense,
        disk_bytes=sum(file.stat().st_size for file in folder.path.glob("*.safetensors")),
        batch=batch,
        context=context,
        weight_bytes=held * itemsize,
        cache_bytes=cache,
        bytes_per_step=read * itemsize + cache,
    )


def _site_infos(config: ModelConfig) -> tuple[SiteInfo, ...]:
    owners = config.factorization.owner_by_name
    found = []
    for site in sites(config):
        rank = config.factorization.rank(site.name)
        kept = 1.0 if rank is None else rank * (site.d_out + site.d_in) / (site.d_out * site.d_in)
        borrowed = tuple(part for part in ("weight", "down", "up", "bias") if f"{site.name}.{part}" in owners)
        found.append(SiteInfo(site.name, site.d_out, site.d_in, rank, kept, borrowed))
    return tuple(found)


def _device_weights(config: ModelConfig) -> tuple[DecoderWeights, int]:
    """The weights as `load` makes them, shapes in place of arrays, and how many numbers they hold: shared ones once."""
    owners, held = config.factorization.owner_by_name, 0

    def place(array: jax.Array) -> jax.Array:
        nonlocal held
        held += array.size
        return array

    def build(stored: dict[str, jax.Array]) -> DecoderWeights:
        return build_weights(config, lambda name: stored[owners.get(name, name)], hardware_rank, place)

    specs = {name: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for name, spec in schema(config).items()}
    return jax.eval_shape(build, specs), held


def _origin(found: Inspection) -> list[str]:
    base = f" of {found.base_model}" if found.base_model else ""
    lines = [f"{found.path}: {found.model_type}, {found.num_layers} layers, {found.dtype}; {found.family}{base}"]
    lines += [f"made from {file.name} ({_size(file.bytes)}, sha256 {file.sha256[:12]})" for file in found.sources]
    return lines + [f"note: {note}" for note in found.notes]


def _rank_table(found: Inspection) -> list[str]:
    """Ranks and kept shares, one row a layer; equal neighbours make one row."""
    names = [f"layers_{{}}.{path}" for path in PROJECTIONS.values()]
    rows = [["layers", *PROJECTIONS], ["", *(_shape(found.site(name.format(0))) for name in names)]]
    layers = [(layer, [_cell(found.site(name.format(layer))) for name in names]) for layer in range(found.num_layers)]
    for cells, group in itertools.groupby(layers, key=lambda row: row[1]):
        numbers = [layer for layer, _ in group]
        rows.append([str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}", *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if (head := found.site("lm_head")) is not None:
        lines.append(f"lm_head: {_cell(head)}, {_shape(head)}")
    if any(site.exceeds_dense for site in found.sites):
        lines.append("! rank above break-even: the factors hold more than the dense weight would")
    if any(site.borrowed for site in found.sites):
        lines.append("= reads a factor that another site stores")
    return lines


def _totals(found: Inspection) -> list[str]:
    at = f"batch {found.batch}, context {found.context}"
    weights, cache, both = map(_size, (found.weight_bytes, found.cache_bytes, found.weight_bytes + found.cache_bytes))
    share = found.params / found.params_dense
    return [
        f"parameters     {found.params:,} stored, {share:.1%} of the dense model's {found.params_dense:,}",
        f"on disk        {_size(found.disk_bytes)}",
        f"on the device  {both}: weights {weights} (ranks as padded), KV cache {cache} ({at}); temporaries come on top",
        f"read per step  {_size(found.bytes_per_step)} to decode one token for each sequence ({at})",
    ]


def _shape(site: SiteInfo | None) -> str:
    return f"{site.d_out}x{site.d_in}" if site else ""


def _cell(site: SiteInfo | None) -> str:
    if site is None or site.rank is None:
        return "dense" if site else ""
    return f"{site.rank} {site.kept:.0%}{'!' * site.exceeds_dense}{'=' * bool(site.borrowed)}"


def _size(count: int) -> str:
    """Bytes in a unit that reads well."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} B"
