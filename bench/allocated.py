"""Ranks as `flashsvd compress --ms-per-token` chooses them for a published shape, with as many parameters as uniform ranks.

There are no weights, so what each rank takes off a site's loss is drawn: it falls as a power of the rank, with an exponent for each
site, as singular values of whitened weights do more or less. Decoding time does not depend on that, but for the ranks it leads to.
"""

import dataclasses
import functools
import zlib

import numpy as np

from flashsvd_jax.compress import Recipe, Target
from flashsvd_jax.compress.budget import decode_milliseconds
from flashsvd_jax.compress.decode_costs import DecodeCosts, load_costs
from flashsvd_jax.compress.ranks import Measures, choose_ranks
from flashsvd_jax.config import ModelConfig
from flashsvd_jax.errors import RequestError
from flashsvd_jax.factorization import Factorization
from flashsvd_jax.schema import count_params
from flashsvd_jax.shapes import layer_sites, shape_config

_ITEMSIZE = 2  # bfloat16
_EXPONENTS = (0.5, 1.5)
_STEPS = 12
_TOLERANCES = {False: 0.002, True: 0.01}
"""Of parameters, by whether layers are alike, when a rank more is one in all of them."""


@functools.cache
def allocated_config(name: str, ratio: float, alike: bool = False, seed: int = 0) -> ModelConfig:
    """A published shape whose ranks the allocator has chosen by the costs of decoding, as many parameters as `shape_config` has.

    They are ``alike`` in all layers, or as each layer's losses have them.

    Raises:
      RequestError: an unknown name, a ratio outside (0, 1), or no time leads to that many parameters, as
        with small models, which decode fastest dense.
    """
    if ratio == 1:
        raise RequestError("ranks by time need a ratio below 1")
    uniform, dense, costs = shape_config(name, ratio), shape_config(name), load_costs()
    gains, wanted = _drawn_gains(dense, seed), count_params(uniform)
    # In which chosen ranks hold more, beside what it takes that layers differ.
    longest = decode_milliseconds(uniform, _ITEMSIZE, costs)
    longest += 0.0 if alike else dense.num_layers * costs.us_a_differing_layer / 1e3
    times = [longest / 2, longest]
    chosen, tolerance = functools.partial(_chosen, dense, gains, costs, alike), _TOLERANCES[alike]
    low, high = map(chosen, times)
    for _ in range(_STEPS):  # parameters rise nearly in proportion to time
        params = [count_params(config) for config in (low, high)]
        middle = float(np.interp((1 - tolerance / 2) * wanted, params, times))
        found = chosen(middle)
        if count_params(found) > wanted:
            high, times[1] = found, middle
        else:
            low, times[0] = found, middle
            if count_params(found) >= (1 - tolerance) * wanted:
                return found
    raise RequestError(f"no time a token leads to the parameters of {name} at ratio {ratio}")


def _chosen(
    dense: ModelConfig, gains: dict[str, np.ndarray], costs: DecodeCosts, alike: bool, milliseconds: float
) -> ModelConfig:
    recipe = Recipe("svd", Target("ms", milliseconds, costs), "greedy", alike=alike)
    ranks = choose_ranks(recipe, dense, _ITEMSIZE, Measures(lambda: gains))
    return dataclasses.replace(dense, factorization=Factorization.of(ranks))


def _drawn_gains(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    found = {}
    for site in layer_sites(config):
        exponent = np.random.default_rng([seed, zlib.crc32(site.name.encode())]).uniform(*_EXPONENTS)
        found[site.name] = np.arange(1.0, min(site.d_out, site.d_in) + 1) ** -exponent
    return found
