"""Which family a checkpoint belongs to."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from converters.families import FAMILIES
from converters.family import Family
from flashsvd_jax.errors import ConversionError


@dataclass(frozen=True)
class Detection:
    """A family and the evidence for it, one phrase each."""

    family: Family
    evidence: tuple[str, ...]


def detect(config: Mapping[str, Any], names: Iterable[str], where: str) -> Detection:
    """The first family in the table that the evidence fits; plain dense weights fit the last one.

    Args:
      config: the configuration that came with the weights; empty if there is none.
      names: every tensor's name.
      where: the checkpoint, for messages.

    Raises:
      ConversionError: the family is known and not read.
    """
    names = list(names)
    for family in FAMILIES:
        evidence = family.evidence(config, names)
        if evidence is None:
            continue
        if family.refusal:
            raise _refused(family, evidence, where)
        for key, value in family.config_values:
            if config.get(key, value) != value:
                raise ConversionError(f"{where} is {family.description}: {key} is {config[key]!r}, not {value!r}")
        return Detection(family, tuple(evidence) or _no_evidence(config))
    raise AssertionError("the last family of the table fits everything")


def _refused(family: Family, evidence: Iterable[str], where: str) -> ConversionError:
    because = ", ".join(evidence)
    return ConversionError(f"{where} is {family.description} ({because}), which is not read yet: {family.refusal}")


def _no_evidence(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Why a checkpoint counts as dense, whatever its configuration claims: some exports are merged back."""
    claims = dict.fromkeys(claim for family in FAMILIES for claim in family.claims(config))
    return ("no tensor has the name of a factor", *(f"although {claim}" for claim in claims))
