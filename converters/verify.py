"""Comparing a converted model with its source: every parameter, and the logits where PyTorch is there to make them.

What the source computes is worked out from its own names once more, not from the plan that the conversion followed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from converters.encoder_naming import naming_of
from converters.family import Family
from converters.naming import Naming
from converters.plan import Plan
from converters.sources import TensorSource, WrappedSource
from converters.verify_logits import LogitsFunction, compare_logits
from flashsvd_jax.checkpoint import ModelFolder, open_folder
from flashsvd_jax.errors import ConversionError
from flashsvd_jax.schema import Site, params_of_no_site, sites

_SEED = 0
_TOKENS = 4
_ROWS = 4096  # of a weight that are widened to float64 together
_EXACT, _ROUNDED = (
    1e-6,
    1e-2,
)  # relative errors that are allowed where the stored dtype holds the weights, and where not


@dataclass(frozen=True)
class Verification:
    """Outcome of a comparison that found nothing wrong.

    Attributes:
      sites: number of projections compared.
      worst_site: the one with the largest error.
      worst_error: that error, relative to the norm of the output.
      logits: what comparing the whole models' logits gave, in words.
    """

    sites: int
    worst_site: str
    worst_error: float
    logits: str

    def lines(self) -> list[str]:
        """For the report."""
        return [
            f"{self.sites} projections, largest relative error {self.worst_error:.1e} ({self.worst_site})",
            self.logits,
        ]


def verify_folder(
    source: TensorSource,
    family: Family,
    plan: Plan,
    hf_config: Mapping[str, Any],
    path: Path,
    logits_fn: LogitsFunction | None = None,
) -> Verification:
    """Compares a converted folder with the checkpoint it was made from.

    Args:
      source: the checkpoint.
      family: how it names its factors.
      plan: the conversion's plan; of its table only the logits make use.
      hf_config: the base model's configuration.
      path: the folder.
      logits_fn: computes logits from the folder.

    Raises:
      ConversionError: names every parameter that differs by more than rounding, or says how far the logits are apart.
    """
    naming = naming_of(plan.config)
    original = _Original(source, family, naming)
    rng = np.random.default_rng(_SEED)
    errors: dict[str, float] = {}
    with open_folder(path) as folder:
        dtype = jnp.dtype(folder.manifest.dtype)
        wrong = [name for name in params_of_no_site(plan.config) if not original.equals(name, folder.get(name))]
        for site in sites(plan.config):
            x = rng.standard_normal((_TOKENS, site.d_in))
            y = _converted_output(x, site, folder)
            errors[site.name] = error = min(_distance(y, expected) for expected in original.outputs(site.name, x))
            if not error <= (_EXACT if original.fits(site.name, dtype) else _ROUNDED):
                wrong.append(f"{site.name} (relative error {error:.1e})")
    if wrong:
        raise ConversionError(f"{path} does not verify, these differ from the source: {', '.join(wrong)}")
    worst = max(errors, key=lambda name: errors[name])
    return Verification(
        len(errors), worst, errors[worst], compare_logits(source, plan, hf_config, path, dtype, logits_fn)
    )


class _Original:
    """The source's own forward pass, by its own names."""

    def __init__(self, source: TensorSource, family: Family, naming: Naming):
        self._source = source
        self._family = family
        self._naming = naming
        self._names = {naming.bare(family.bare(name)): name for name in source.infos()}

    def equals(self, name: str, stored: np.ndarray) -> bool:
        """Whether a stored array of no projection is the source's, cast."""
        stored_as = next(other for other in self._naming.parameter(name) if other in self._names)
        return np.array_equal(stored, self._get(stored_as).astype(stored.dtype))

    def fits(self, site: str, dtype: np.dtype) -> bool:
        """Whether a projection's weights can be stored in a dtype without rounding."""
        return all(np.can_cast(self._get(name).dtype, dtype) for name in self._layers(site))

    def outputs(self, site: str, x: np.ndarray) -> list[np.ndarray]:
        """What a projection makes of x [tokens, d_in], in every order of its layers that the family allows."""
        names = self._layers(site)
        whole = self._source.output(self._names[names[0]], x) if isinstance(self._source, WrappedSource) else None
        if whole is not None:
            return [self._with_bias(whole, site, names[-1])]
        orders = [names] if self._family.names == "binding" else [names, names[::-1]]
        return [self._output(site, order, x) for order in orders if self._chains(order, x.shape[1])]

    def _output(self, site: str, layers: list[str], x: np.ndarray) -> np.ndarray:
        for name in layers:
            x = _apply(x, self._get(name))
        return self._with_bias(x, site, layers[-1])

    def _with_bias(self, x: np.ndarray, site: str, second: str | None = None) -> np.ndarray:
        bias = next((name for name in self._naming.biases(site, second) if name in self._names), None)
        return x if bias is None else x + self._get(bias).astype(np.float64)

    def _layers(self, site: str) -> list[str]:
        """Names of a projection's weights in the order of application that their names tell."""
        module = self._naming.module(site)
        for rule in self._family.pairs:
            names = list(rule.names(module))
            if all(name in self._names for name in names):
                return names
        return [f"{module}.weight"]

    def _chains(self, layers: list[str], d_in: int) -> bool:
        for name in layers:
            d_out, expected = self._get(name).shape
            if expected != d_in:
                return False
            d_in = d_out
        return True

    def _get(self, name: str) -> np.ndarray:
        return self._source.get(self._names[name])


def _converted_output(x: np.ndarray, site: Site, folder: ModelFolder) -> np.ndarray:
    rank = folder.config.factorization.rank(site.name)
    for part in ("weight",) if rank is None else ("down", "up"):
        weight = folder.get(f"{site.name}.{part}")
        if weight.ndim == 2:
            x = _apply(x, weight)
        else:
            shares = np.split(x, len(weight), axis=1)
            x = np.concatenate([_apply(share, block) for share, block in zip(shares, weight, strict=True)], axis=1)
    return x + folder.get(f"{site.name}.bias").astype(np.float64) if site.has_bias else x


def _apply(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """``x @ weight.T`` in float64, some rows at a time, as a vocabulary's worth of float64 need not fit in memory."""
    starts = range(0, weight.shape[0], _ROWS)
    return np.concatenate([x @ weight[start : start + _ROWS].astype(np.float64).T for start in starts], axis=1)


def _distance(y: np.ndarray, expected: np.ndarray) -> float:
    """Relative to the norm of what is expected; absolute where that is zero."""
    return float(np.linalg.norm(y - expected) / (np.linalg.norm(expected) or 1.0))
