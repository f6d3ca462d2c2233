"""Where every parameter of a model comes from: a table made from names and shapes alone, checked in both directions."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

from converters.encoder_naming import naming_of
from converters.family import Family
from converters.naming import Naming
from converters.pairing import take_factors
from converters.pool import Pool
from converters.ranks import rank_problems
from converters.sources import TensorInfo
from flashsvd_jax.any_config import AnyConfig
from flashsvd_jax.errors import ConversionError
from flashsvd_jax.factorization import Factorization
from flashsvd_jax.schema import params_of_no_site, schema, sites, stored_names

_FLOATS = tuple(map(np.dtype, (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)))
_MAX_LISTED = 100
_TIED = "; the base configuration ties the head to the embedding (tie_word_embeddings)"
_UNTIED = "; the base configuration does not tie it to the embedding"


@dataclass(frozen=True)
class Plan:
    """How one checkpoint becomes one model.

    Attributes:
      config: the model, factorization included.
      tensors: for every parameter, shared ones included, the tensor that it is a copy of.
      dropped: tensors that are not needed.
      equal: pairs of tensors that must hold the same values; the first of each is dropped.
      notes: what the report should say.
    """

    config: AnyConfig
    tensors: Mapping[str, TensorInfo]
    dropped: tuple[str, ...]
    equal: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]

    @property
    def stored(self) -> dict[str, TensorInfo]:
        """The tensors that are written: one for each array, however many parameters share it."""
        return {name: self.tensors[name] for name in stored_names(self.config)}

    def changed(self, tensors: Mapping[str, TensorInfo], ranks: Mapping[str, int]) -> "Plan":
        """The plan with other tensors for some parameters, and other ranks by site."""
        found, groups = {**self.tensors, **tensors}, self.config.factorization.groups_by_site
        return replace(self, config=_factorized(self.config, found, ranks, groups), tensors=found)


def make_plan(
    config: AnyConfig,
    tensors: Mapping[str, TensorInfo],
    family: Family,
    rank_map: object = None,
    where: str = "the checkpoint",
) -> Plan:
    """Finds the source of every parameter.

    Args:
      config: the base model.
      tensors: all tensors of the checkpoint.
      family: how it names them.
      rank_map: what its configuration says about ranks, if it does.
      where: the checkpoint, for messages.

    Raises:
      ConversionError: names everything that is missing, unexpected, mis-shaped, the wrong way round or of another rank
        than the configuration says.
    """
    naming = naming_of(config)
    pool = Pool(tensors, lambda name: naming.bare(family.bare(name)))
    by_module = {naming.module(site.name): site for site in sites(config)}
    equal = _drop_twins(naming, pool)
    factors, notes = take_factors(family, by_module, pool)
    ranks = {by_module[module].name: pair.rank for module, pair in factors.items() if pair is not None}
    groups = {by_module[module].name: pair.groups for module, pair in factors.items() if pair is not None}
    broken = {by_module[module].name for module, pair in factors.items() if pair is None}
    found: dict[str, TensorInfo] = {}
    for module, site in by_module.items():
        pair = factors.get(module)
        if pair is not None:
            found |= {f"{site.name}.down": pair.down, f"{site.name}.up": pair.up}
        elif site.name not in broken:
            hint = _UNTIED if module == naming.head else ""
            found |= _take(pool, f"{site.name}.weight", (site.d_out, site.d_in), f"{module}.weight", hint=hint)
        if site.has_bias:
            up = pool.bare(pair.up.name) if pair is not None else None
            found |= _take(pool, f"{site.name}.bias", (site.d_out,), *naming.biases(site.name, up))
    for name, spec in params_of_no_site(config).items():
        found |= _take(pool, name, spec.shape, *naming.parameter(name))
    for name in filter(naming.is_unused, list(pool.left)):
        pool.drop(name)
    pool.problems += rank_problems(rank_map, family.rank_map, ranks, broken, by_module, naming.claimed)
    for name, info in pool.left.items():
        tied = config.tie_embeddings and name.startswith(f"{naming.head}.")
        pool.problems.append(f"unexpected: {info.name} {list(info.shape)}{_TIED if tied else ''}")
    pool.problems += [f"not floating point: {t.name} is {t.dtype}" for t in found.values() if t.dtype not in _FLOATS]
    if pool.problems:
        raise ConversionError(_message(where, family, pool.problems))
    factorized = _factorized(config, found, ranks, groups)
    return Plan(factorized, found, tuple(pool.dropped), equal, tuple(notes))


def _take(pool: Pool, target: str, shape: tuple[int, ...], *names: str, hint: str = "") -> dict[str, TensorInfo]:
    info = pool.require(shape, *names, hint=hint)
    return {} if info is None else {target: info}


def _drop_twins(naming: Naming, pool: Pool) -> tuple[tuple[str, str], ...]:
    """A stored twin, such as a tied head, must hold the other's values; what is still to be compared is returned."""
    equal = []
    for twin, kept in naming.twins:
        dropped, other = pool.left.get(twin), pool.left.get(kept)
        if dropped is None or other is None or dropped.shape != other.shape:
            continue
        pool.drop(twin)
        if dropped.identity != other.identity:
            equal.append((dropped.name, other.name))
    return tuple(equal)


def _factorized(
    config: AnyConfig, found: Mapping[str, TensorInfo], ranks: Mapping[str, int], groups: Mapping[str, int]
) -> AnyConfig:
    """The model with these ranks and groups by site, and parameters shared where they are one tensor."""
    apart = Factorization.of(ranks, groups=groups)
    shared = _shared(replace(config, factorization=apart), found)
    return replace(config, factorization=Factorization.of(ranks, shared, groups))


def _shared(config: AnyConfig, found: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Parameters that are the very tensor of an earlier parameter, and which."""
    owners: dict[object, str] = {}
    owner_by_name = {name: owners.setdefault(found[name].identity, name) for name in schema(config)}
    return {name: owner for name, owner in owner_by_name.items() if name != owner}


def _message(where: str, family: Family, problems: Iterable[str]) -> str:
    problems = list(problems)
    more = [f"and {len(problems) - _MAX_LISTED} more"] if len(problems) > _MAX_LISTED else []
    lines = "".join(f"\n  {line}" for line in problems[:_MAX_LISTED] + more)
    count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
    return f"{where}, read as {family.description}, does not fit the base model's configuration; {count}:{lines}"
