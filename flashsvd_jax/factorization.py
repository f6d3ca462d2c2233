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
      groups: ``(site, number)`` for every site whose second factor is block-diagonal, such as one of single heads; its rank is
        that of each group.
    """

    ranks: tuple[tuple[str, int], ...] = ()
    shared: tuple[tuple[str, str], ...] = ()
    groups: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(
        cls,
        ranks: Mapping[str, int],
        shared: Mapping[str, str] | None = None,
        groups: Mapping[str, int] | None = None,
    ) -> "Factorization":
        """From plain mappings, in any order; sites of one group may be left out."""
        several = sorted((site, number) for site, number in (groups or {}).items() if number > 1)
        return cls(tuple(sorted(ranks.items())), tuple(sorted((shared or {}).items())), tuple(several))

    def rank(self, site: str) -> int | None:
        """The true (unpadded) rank of a site, or None where it is dense."""
        return self.rank_by_site.get(site)

    @property
    def rank_by_site(self) -> dict[str, int]:
        return dict(self.ranks)

    @property
    def groups_by_site(self) -> dict[str, int]:
        """Groups of every low-rank site, 1 for most."""
        return dict.fromkeys(self.rank_by_site, 1) | dict(self.groups)

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
        ranks, groups = ({site: n for site, n in given if site not in sites} for given in (self.ranks, self.groups))
        return Factorization.of(ranks, shared, groups)

    def __bool__(self) -> bool:
        return bool(self.ranks)


def _factor_of(name: str, sites: Collection[str]) -> bool:
    """Whether an array is a factor of one of the sites; their biases stay."""
    site, _, part = name.rpartition(".")
    return part in ("down", "up") and site in sites
