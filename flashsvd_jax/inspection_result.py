"""What an inspection finds, and that as text: where the model comes from, a table of ranks, sizes."""

import dataclasses
import itertools
import json
from collections import defaultdict
from collections.abc import Mapping

from flashsvd_jax.checkpoint.manifest import SourceFile

_EXPANDED = {
    "auto": "~ expanded to the dense weight at load, which holds less than the factors with their ranks as padded:",
    "always": "~ expanded to the dense weight at load, as asked:",
}


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
        return "\n".join([*_origin(self), "", *_rank_table(self), "", *_totals(self)])


def _origin(found: Inspection) -> list[str]:
    base = f" of {found.base_model}" if found.base_model else ""
    lines = [f"{found.path}: {found.model_type}, {found.num_layers} layers, {found.dtype}; {found.family}{base}"]
    lines += [f"made from {file.name} ({_size(file.bytes)}, sha256 {file.sha256[:12]})" for file in found.sources]
    return lines + [f"note: {note}" for note in found.notes]


def _rank_table(found: Inspection) -> list[str]:
    """Ranks and kept shares, one row a layer; equal neighbours make one row."""
    names = [f"layers_{{}}.{path}" for path in found.projections.values()]
    rows = [["layers", *found.projections], ["", *(_shape(found.site(name.format(0))) for name in names)]]
    layers = [(layer, [_cell(found.site(name.format(layer))) for name in names]) for layer in range(found.num_layers)]
    for cells, group in itertools.groupby(layers, key=lambda row: row[1]):
        numbers = [layer for layer, _ in group]
        rows.append([str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}", *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    heads = [site for site in found.sites if not site.name.startswith("layers_")]
    lines += [f"{head.name}: {_cell(head)}, {_shape(head)}" for head in heads]
    if any(site.exceeds_dense for site in found.sites):
        lines.append("! rank above break-even: the factors hold more than the dense weight would")
    if any(site.groups > 1 for site in found.sites):
        lines.append("x so many heads, or other groups of outputs, with factors of this rank each")
    if any(site.borrowed for site in found.sites):
        lines.append("= reads a factor that another site stores")
    return lines + _expansions(found)


def _expansions(found: Inspection) -> list[str]:
    """Bytes of both forms of what is expanded, one line for each projection, or for those that share a first factor."""
    if not found.expansions:
        return []
    short = {path: name for name, path in found.projections.items()}
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for expansion in found.expansions:
        names = [short.get(site.partition(".")[2], site) for site in expansion.sites]
        row = sums[", ".join(dict.fromkeys(names))]
        for column, count in enumerate((len(names), expansion.factor_bytes, expansion.dense_bytes)):
            row[column] += count
    lines = [
        f"  {names}: {count} site{'s' * (count > 1)}, {_size(dense)} in place of {_size(factors)}"
        for names, (count, factors, dense) in sums.items()
    ]
    return [_EXPANDED[found.materialize], *lines]


def _totals(found: Inspection) -> list[str]:
    at = f"batch {found.batch}, context {found.context}"
    share = found.params / found.params_dense
    lines = [
        f"parameters     {found.params:,} stored, {share:.1%} of the dense model's {found.params_dense:,}",
        f"on disk        {_size(found.disk_bytes)}",
    ]
    if found.cache_bytes is None or found.bytes_per_step is None or found.dense_bytes_per_step is None:
        return [
            *lines,
            f"on the device  {_size(found.weight_bytes)} (as loaded: ranks padded); temporaries come on top",
            *_passes(found, at),
        ]
    weights, cache, both = map(_size, (found.weight_bytes, found.cache_bytes, found.weight_bytes + found.cache_bytes))
    return [
        *lines,
        f"on the device  {both}: weights {weights} (as loaded: ranks padded), KV cache {cache} ({at}); temporaries come on top",
        f"read per step  {_size(found.bytes_per_step)} to decode one token for each sequence ({at});"
        f" dense {_size(found.dense_bytes_per_step)}",
        *_kernel(found),
    ]


def _kernel(found: Inspection) -> list[str]:
    """How a step is computed on this machine, and why not otherwise."""
    own = "" if found.decode_workspace is None else f", {_size(found.decode_workspace)} of memory for itself"
    refusals = [f"  not {name}: {reason}" for name, reason in found.decode_refusals.items()]
    return [f"decodes with   {found.decode_kernel}{own}, on this machine", *refusals]


def _passes(found: Inspection, at: str) -> list[str]:
    """How an encoder's layers are computed on this machine, and why not otherwise."""
    chosen = "; ".join(f"{op}: {', '.join(used)}" for op, used in found.pass_kernels.items())
    refusals = {
        f"  {op} not by {reason}" for op, used in found.pass_kernels.items() for why in used.values() for reason in why
    }
    return [f"encodes with   {chosen}, on this machine ({at})", *sorted(refusals)]


def _shape(site: SiteInfo | None) -> str:
    return f"{site.d_out}x{site.d_in}" if site else ""


def _cell(site: SiteInfo | None) -> str:
    if site is None or site.rank is None:
        return "dense" if site else ""
    marks = "!" * site.exceeds_dense + "=" * bool(site.borrowed) + "~" * site.expanded
    rank = site.rank if site.groups == 1 else f"{site.groups}x{site.rank}"
    return f"{rank} {site.kept:.0%}{marks}"


def _size(count: int) -> str:
    """Bytes in a unit that reads well."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} B"
