"""Random weights of a configuration: the time that a model takes does not depend on theirs."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from flashsvd_jax.any_config import AnyConfig
from flashsvd_jax.config import ModelConfig
from flashsvd_jax.models.weights import DecoderWeights, build_weights
from flashsvd_jax.schema import schema
from pallas_kernels import hardware_rank

_MANY_SHAPES = 32  # drawing on the device compiles a program for each shape; a model of mixed ranks has hundreds


def random_weights(config: ModelConfig, dtype: str = "bfloat16") -> DecoderWeights:
    """Weights on the device, scaled so that activations neither vanish nor explode."""
    if len({spec.shape for spec in schema(config).values()}) > _MANY_SHAPES:
        return build_weights(config, arrays_of_the_host(config, dtype), hardware_rank, jax.device_put)
    return build_weights(config, random_arrays(config, dtype), hardware_rank)


def arrays_of_the_host(config: AnyConfig, dtype: str = "bfloat16") -> Callable[[str], np.ndarray]:
    """Flat name -> array of numpy, cut from one row of random numbers for each scale, a power of two."""
    specs, rng, rows = schema(config), np.random.default_rng(0), dict[int, np.ndarray]()

    def get(name: str) -> np.ndarray:
        shape = specs[name].shape
        if name.endswith(".scale"):
            return np.ones(shape, jnp.dtype(dtype))
        power = round(math.log2(shape[-1]) / 2)
        if power not in rows:
            rows[power] = (rng.standard_normal(2**22, np.float32) / 2**power).astype(jnp.dtype(dtype))
        return np.resize(np.roll(rows[power], rng.integers(2**22)), shape)

    return get


def random_arrays(config: AnyConfig, dtype: str = "bfloat16") -> Callable[[str], jax.Array]:
    """Flat name -> array, drawn on the device as `random_weights` says."""
    specs, offset = schema(config), config.norm_offset if isinstance(config, ModelConfig) else 0.0
    key = jax.random.key(0)

    @jax.jit
    def scaled(key: jax.Array, like: jax.Array) -> jax.Array:
        return (jax.random.normal(key, like.shape, jnp.float32) / like.shape[-1] ** 0.5).astype(like.dtype)

    def get(name: str) -> jax.Array:
        nonlocal key
        key, draw = jax.random.split(key)
        empty = jnp.ones(specs[name].shape, dtype)
        return empty - offset if name.endswith(".scale") else scaled(draw, empty)

    return get
