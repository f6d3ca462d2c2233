"""Checks the ranks that a configuration claims against those of the tensors."""

from collections.abc import Callable, Mapping, Set
from typing import Any

from flashsvd_jax.schema import Site


def rank_problems(
    claimed: object,
    key: str,
    ranks: Mapping[str, int],
    broken: Set[str],
    by_module: Mapping[str, Site],
    module_of: Callable[[str], str],
) -> list[str]:
    """Where a configuration's map of ranks and the tensors disagree, one sentence a module.

    Args:
      claimed: module name -> rank, or ``{"rank": rank}``; nothing is checked where it is None or empty.
      key: its name in config.json, for messages.
      ranks: rank of every low-rank site, from shapes.
      broken: sites whose factors are a problem already.
      by_module: all sites by module path.
      module_of: a name in the map -> that path.
    """
    if not claimed:
        return []
    said = _read(claimed, module_of)
    if said is None:
        return [f"rank map: {key} in config.json does not map module names to ranks"]
    problems = []
    for module, site in by_module.items():
        rank, stored = said.pop(module, None), ranks.get(site.name)
        if rank != stored and site.name not in broken:
            problems.append(f"rank map: {key} says {_words(rank)} for {module}, the tensors say {_words(stored)}")
    return problems + [f"rank map: {key} names {module}, which the base model does not have" for module in said]


def _read(claimed: object, module_of: Callable[[str], str]) -> dict[str, int] | None:
    """The claimed ranks by module path in the whole model, whichever prefix the names have."""
    if not isinstance(claimed, Mapping):
        return None
    said: dict[str, int] = {}
    for name, entry in claimed.items():
        rank: Any = entry.get("rank") if isinstance(entry, Mapping) else entry
        if not isinstance(rank, int):
            return None
        said[module_of(str(name).removeprefix("wrapped_model."))] = rank
    return said


def _words(rank: int | None) -> str:
    return "dense" if rank is None else f"rank {rank}"
