"""The two factors of every low-rank projection, and which of them comes first."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from converters.family import Family
from converters.pool import Pool
from converters.rules import Reading, bias_of, read_shapes
from converters.sources import TensorInfo
from flashsvd_jax.schema import Site


@dataclass(frozen=True)
class Factors:
    """The factors of a projection: down [rank, d_in], up [d_out, rank]; in groups as `flashsvd_jax.param_specs.Site` has them."""

    down: TensorInfo
    up: TensorInfo

    @property
    def rank(self) -> int:
        return self.up.shape[-1]

    @property
    def groups(self) -> int:
        return self.up.shape[0] if len(self.up.shape) == 3 else 1


@dataclass(frozen=True)
class _Pair:
    """Two tensors in the order of their names, and the order that their shapes allow."""

    first: TensorInfo
    second: TensorInfo
    reading: Reading


def take_factors(family: Family, sites: Mapping[str, Site], pool: Pool) -> tuple[dict[str, Factors | None], list[str]]:
    """Takes every pair of factors out of the pool.

    Args:
      family: how they are named.
      sites: projections by module path.
      pool: what is wrong is added to its problems.

    Returns:
      Factors by module path, None where they are unusable; a module without an entry is dense. Notes for the report.
    """
    factors: dict[str, Factors | None] = {}
    pairs: dict[str, _Pair] = {}
    for module, site in sites.items():
        first, second = _take_pair(family, module, pool)
        if first is not None and second is not None:
            pairs[module] = _Pair(first, second, read_shapes(first.shape, second.shape, site.d_out, site.d_in))
        elif first is not None or second is not None:
            factors[module] = None
    readings: Counter[Reading] = Counter(pair.reading for pair in pairs.values())
    for module, pair in pairs.items():
        factors[module] = _order(family, sites[module], pair, readings, pool)
    return factors, _notes(family, readings)


def _take_pair(family: Family, module: str, pool: Pool) -> tuple[TensorInfo | None, TensorInfo | None]:
    for rule in family.pairs:
        names = rule.names(module)
        if f"{module}.weight" in names and not all(name in pool.left for name in names):
            continue  # without the other factor this is the name of a dense weight
        first, second = (pool.take(name) for name in names)
        if first is None and second is None:
            continue
        pool.problems += [
            f"missing: {name}, the other factor is there"
            for name, info in zip(names, (first, second), strict=True)
            if info is None
        ]
        return first, second
    return None, None


def _reading_of_square_pairs(family: Family, readings: Counter[Reading]) -> Reading:
    """How to read pairs whose shapes allow both orders: as all the others are, or else as the names say."""
    named, swapped = readings["as named"] > 0, readings["swapped"] > 0
    if family.names != "binding" and swapped and not named:
        return "swapped"
    return "either" if family.names == "none" and named == swapped else "as named"


def _order(family: Family, site: Site, pair: _Pair, readings: Counter[Reading], pool: Pool) -> Factors | None:
    """The factors in the order that holds, or None and a problem."""
    first, second = pair.first, pair.second
    reading = _reading_of_square_pairs(family, readings) if pair.reading == "either" else pair.reading
    shapes = f"{first.name} {list(first.shape)} and {second.name} {list(second.shape)}"
    weight = f"[{site.d_out}, {site.d_in}] of the base model"
    if reading == "neither":
        pool.problems.append(f"mis-shaped: {shapes} do not form the weight {weight}")
    elif reading == "either":
        pool.problems.append(f"ambiguous: {shapes} form the weight {weight} in either order; no other pair tells which")
    elif reading == "swapped" and family.names == "binding":
        pool.problems.append(
            f"wrong way round: {shapes} form the weight {weight} only if {first.name} is applied last, "
            f"and {family.description} applies it first"
        )
    elif reading == "swapped" and site.d_out == site.d_in and readings["as named"]:
        pool.problems.append(
            f"ambiguous: {shapes} form the weight {weight} if {first.name} is applied last, unlike {readings['as named']} other "
            "pairs, and the transposed weight if both are transposed"
        )
    else:
        factors = Factors(first, second) if reading == "as named" else Factors(second, first)
        _refuse_bias_of_first(factors, pool)
        return factors
    return None


def _refuse_bias_of_first(factors: Factors, pool: Pool) -> None:
    # Dobi-SVD's layer gives the bias of the output to the factor that ends in the rank: its own forward pass fails.
    bias = pool.take(bias_of(pool.bare(factors.down.name)))
    if bias is not None:
        pool.problems.append(f"bias on the first factor: {bias.name} {list(bias.shape)}; only output biases are read")


def _notes(family: Family, readings: Counter[Reading]) -> list[str]:
    if family.names == "binding" or not readings["swapped"]:
        return []
    second, first = (name.lstrip("._").removesuffix(".weight") for name in reversed(family.pairs[0].names("")))
    count = f"{readings['swapped']} of {readings.total()} sites"
    return [f"{second} is applied before {first} at {count}, as only that fits their shapes"]
