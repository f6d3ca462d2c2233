"""Ranks that are trained by gradients of the model's loss, which Adaptive Rank Selection and Dobi-SVD do.

Every projection is the sum of its components, the first of them the most important by the method's own loss, and has one number k
to train: how many of them it keeps. Component i counts ``(1 + tanh((k - i) / w)) / 2``, so k has a gradient.

That is the gate of Dobi-SVD (Wang et al. 2025), which also takes the components anew from each batch's outputs and sends gradients
through that; here they stay as calibration gives them. Its w is a tenth of a rank; here it is a share of the break-even rank, so
that a gradient tells of more than two components. Adaptive Rank Selection (Gao et al. 2024) has a network make a random mask of
each projection's components, and a loss by which masks are to keep the first ones, which one number does by itself. Both add a
penalty for parameters beyond the budget; here it is what holds the budget, the Lagrange multiplier, at every step. Nothing is drawn
at random, and nothing but these numbers is trained.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flashsvd_jax.compress.budget import Budget
from flashsvd_jax.config import ModelConfig
from flashsvd_jax.errors import CheckpointError
from flashsvd_jax.models.decoder import full_logits, token_losses
from flashsvd_jax.models.weights import build_weights
from flashsvd_jax.param_specs import Site
from flashsvd_jax.progress import progress_bar
from flashsvd_jax.schema import schema
from flashsvd_jax.shapes import uniform_rank

STEPS = 64
"""Of Adam, each by the gradient of one window of the calibration text, in their order and over again."""
WIDTH = 0.05
"""w, as a share of the break-even rank."""
_RATE, _FIRST_MOMENT, _SECOND_MOMENT = 0.03, 0.9, 0.99
_LEAST = 0.01
_BISECTIONS = 60


class Components(NamedTuple):
    """A weight, or those that share a basis below each other, as ``up @ down`` of its whole rank, float32, by importance.

    Attributes:
      up: [d_out, rank].
      down: [rank, d_in].
      members: the sites that it is the weight of.
    """

    up: np.ndarray
    down: np.ndarray
    members: Sequence[str]


def learned_shares(
    config: ModelConfig,
    get: Callable[[str], np.ndarray],
    components: Mapping[str, Components],
    ratio: float,
    tokens: np.ndarray,
    progress: bool,
) -> dict[str, float]:
    """Which share of its parameters each site keeps, that of all of them together being the ratio.

    The whole model, its components and the activations of one window are on the device in float32.

    Args:
      config: the dense model.
      get: flat name -> array.
      components: of all projections of the layers, by their first sites.
      ratio: of parameters to keep.
      tokens: int32 [windows, length].
      progress: show a bar when it takes more than two seconds.

    Raises:
      CheckpointError: the loss has no finite gradient.
    """
    names = list(components)
    sizes = np.array([c.up.shape[0] * c.down.shape[1] for c in components.values()], float)
    gradients = _gradients(config, get, components)
    shares, adam = np.full(len(names), ratio), _Adam(len(names))
    with progress_bar("learning ranks", STEPS, " steps", progress) as bar:
        for step in range(STEPS):
            found = gradients(dict(zip(names, shares, strict=True)), tokens[step % len(tokens)])
            # What a parameter more of each site does to the loss, beyond what it does at all sites: along the budget.
            worth = np.array([float(found[name]) for name in names]) / sizes
            if not np.isfinite(worth).all():
                raise CheckpointError(
                    "the model is not usable: on the calibration text, its loss has no finite gradient"
                )
            free = (shares > _LEAST) & (shares < 1)
            along = worth - (worth[free].mean() if free.any() else worth.mean())
            rate = _RATE * (1 + np.cos(np.pi * step / STEPS)) / 2
            shares = moved(shares - rate * adam.direction(along), sizes, ratio)
            bar.update()
    return dict(zip(names, shares.tolist(), strict=True))


def learned_ranks(sites: Sequence[Site], ratio: float, shares: Mapping[str, float], budget: Budget) -> dict[str, int]:
    """Ranks at those shares, all raised or lowered by one number for another ratio than they were learned for."""
    sizes = np.array([site.d_out * site.d_in for site in sites], float)
    found = moved(np.array([shares[site.name] for site in sites]), sizes, ratio)
    return {site.name: budget.rounded(uniform_rank(site, kept)) for site, kept in zip(sites, found, strict=True)}


def moved(shares: np.ndarray, sizes: np.ndarray, ratio: float) -> np.ndarray:
    """The shares with one number added to all, none beyond its bounds, such that their mean over parameters is the ratio."""
    low, high = -1.0 - float(shares.max()), 1.0 - float(shares.min())
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        kept = np.clip(shares + middle, _LEAST, 1.0) @ sizes / sizes.sum()
        low, high = (middle, high) if kept <= ratio else (low, middle)
    return np.clip(shares + low, _LEAST, 1.0)


class _Adam:
    """Adam (Kingma and Ba 2015) for a few numbers."""

    def __init__(self, count: int):
        self._first, self._second, self._steps = np.zeros(count), np.zeros(count), 0

    def direction(self, gradient: np.ndarray) -> np.ndarray:
        """What a learning rate multiplies."""
        self._steps += 1
        self._first += (1 - _FIRST_MOMENT) * (gradient - self._first)
        self._second += (1 - _SECOND_MOMENT) * (gradient**2 - self._second)
        mean = self._first / (1 - _FIRST_MOMENT**self._steps)
        return mean / np.maximum(np.sqrt(self._second / (1 - _SECOND_MOMENT**self._steps)), 1e-300)


def _gradients(
    config: ModelConfig, get: Callable[[str], np.ndarray], components: Mapping[str, Components]
) -> Callable[[Mapping[str, float], np.ndarray], Mapping[str, jax.Array]]:
    """What the shares do to the mean next-token loss of a window."""
    factors = {name: (jnp.asarray(c.up), jnp.asarray(c.down)) for name, c in components.items()}
    projections = {f"{site}.weight" for c in components.values() for site in c.members}
    rest = {name: jnp.asarray(get(name), jnp.float32) for name in schema(config).keys() - projections}

    def loss(shares: Mapping[str, jax.Array], factors: Mapping, rest: Mapping, window: jax.Array) -> jax.Array:
        weights = dict(rest)
        for name, (up, down) in factors.items():
            members = components[name].members
            parts = jnp.split(_gated(up, down, shares[name]), len(members))
            weights |= {f"{site}.weight": part for site, part in zip(members, parts, strict=True)}
        logits = full_logits(config, build_weights(config, weights.__getitem__), window[None, :-1])[0]
        return token_losses(logits, window[1:]).mean()

    gradient = jax.jit(jax.grad(loss))

    def of(shares: Mapping[str, float], window: np.ndarray) -> Mapping[str, jax.Array]:
        with jax.default_matmul_precision("highest"):
            return gradient({name: jnp.float32(share) for name, share in shares.items()}, factors, rest, window)

    return of


def _gated(up: jax.Array, down: jax.Array, share: jax.Array) -> jax.Array:
    """The weight with a share of its parameters, the last components that count counting in part."""
    break_even = up.shape[0] * down.shape[1] / (up.shape[0] + down.shape[1])
    places = jnp.arange(up.shape[1]) + 0.5
    return (up * (0.5 + 0.5 * jnp.tanh((share * break_even - places) / (WIDTH * break_even)))) @ down
