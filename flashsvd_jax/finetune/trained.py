"""What is trained: the factors themselves in float32, or adapters on them (LoRA, Hu et al. 2021) that are added in the end."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from flashsvd_jax.config import ModelConfig
from flashsvd_jax.schema import stored_names

Arrays = dict[str, jax.Array]


def factor_names(config: ModelConfig) -> list[str]:
    """The factors that are stored, by their flat names; one that several sites share is there once."""
    sites = config.factorization.rank_by_site
    return [
        name for name in stored_names(config) if name.endswith((".down", ".up")) and name.rpartition(".")[0] in sites
    ]


def initial(config: ModelConfig, get: Callable[[str], np.ndarray], lora: int | None, seed: int) -> Arrays:
    """What training starts from, such that the model is as it was.

    Args:
      config: the compressed model.
      get: flat name -> array.
      lora: rank of adapters, None for the factors themselves.
      seed: of the adapters.

    Returns:
      float32 arrays: factors by their names, or adapters as ``NAME.lora_a`` [..., lora, columns], normal with a variance of
      one over the columns, and ``NAME.lora_b`` [..., rows, lora], zero.
    """
    names = factor_names(config)
    if lora is None:
        return {name: jnp.asarray(get(name), jnp.float32) for name in names}
    found: Arrays = {}
    for name, key in zip(names, jax.random.split(jax.random.key(seed), len(names)), strict=True):
        *groups, rows, columns = get(name).shape
        found[f"{name}.lora_a"] = jax.random.normal(key, (*groups, lora, columns), jnp.float32) * columns**-0.5
        found[f"{name}.lora_b"] = jnp.zeros((*groups, rows, lora), jnp.float32)
    return found


def merged(name: str, base: jax.Array | None, trained: Mapping[str, jax.Array]) -> jax.Array:
    """A factor as it is with what was trained, float32; ``base`` is the stored one, which training of factors does not need."""
    if name in trained:
        return trained[name]
    assert base is not None
    change = jnp.matmul(trained[f"{name}.lora_b"], trained[f"{name}.lora_a"], precision="highest")
    return base.astype(jnp.float32) + change
