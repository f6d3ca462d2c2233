"""Which sites of a model are low rank, with which rank, and which of them share an array.

A *site* is the dotted path of a projection in the parameter tree, such as ``layers_0.self_attn.q_proj``.
"""

import dataclasses
from collections.abc import Collection, Mapping

# What `load` may do with low-rank sites: expand those that hold more than their dense weights, none, or all.
MATERIALIZE = ("auto", "never", "always")


@dataclasses.dataclass(frozen=True)
class Factorization:
    """Ranks by site, and aliases between arrays. Hashable, so a configuration that holds it can be a static argument.

    Attributes:
      ranks: ``(site, rank)`` for every low-rank site, sorted; a site not listed is dense.
      shared: ``(name, owner)`` for every array that is another one, such as
        ``("layers_1.self_attn.q_proj.down", "layers_0.self_attn.q_proj.down")``; the owner is stored, the name is not.
    """

    ranks: tuple[tuple[str, int], ...] = ()
    shared: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, ranks: Mapping[str, int], shared: Mapping[str, str] | None = None) -> "Factorization":
        """From plain mappings, in any order."""
        return cls(tuple(sorted(ranks.items())), tuple(sorted((shared or {}).items())))

    def rank(self, site: str) -> int | None:
        """The true (unpadded) rank of a site, or None where it is dense."""
        return self.rank_by_site.get(site)

    @property
    def rank_by_site(self) -> dict[str, int]:
        return dict(self.ranks)

    @property
    def owner_by_name(self) -> dict[str, str]:
        return dict(self.shared)

    def without(self, sites: Collection[str]) -> "Factorization":
        """The same with these sites dense; an array that one of them owned goes to the first of the others that read it."""
        new_owners: dict[str, str] = {}
        shared = {}
        for name, owner in self.shared:
            if _factor_of(name, sites):
                continue
            if _factor_of(owner, sites):
                owner = new_owners.setdefault(owner, name)
            if name != owner:
                shared[name] = owner
        return Factorization.of({site: rank for site, rank in self.ranks if site not in sites}, shared)

    def __bool__(self) -> bool:
        return bool(self.ranks)


def _factor_of(name: str, sites: Collection[str]) -> bool:
    """Whether an array is a factor of one of the sites; their biases stay."""
    site, _, part = name.rpartition(".")
    return part in ("down", "up") and site in sites
