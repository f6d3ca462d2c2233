"""The engine's steps of a prompt at the widths of Llama-2-7B, some layers deep, with shapes for weights."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from cut_models import first_layers
from described_device import as_on_device, on_device

from flashsvd_jax.config import ModelConfig
from flashsvd_jax.engine import Engine
from flashsvd_jax.models.weights import build_weights
from flashsvd_jax.sampling import SamplingParams
from flashsvd_jax.schema import abstract_params, flatten
from flashsvd_jax.shapes import mixed_config, shape_config
from pallas_kernels import hardware_rank


def lower_prompt(ranks: str, layers: int, tokens: int, step: int) -> Any:
    """A step of theirs, of "uniform" or "mixed" ranks, lowered as on an H200. Only in a process that describes one."""
    config: ModelConfig = (mixed_config if ranks == "mixed" else shape_config)("llama-2-7b", 0.5)
    config = first_layers(config, layers)
    build = partial(build_weights, config, pad_rank=hardware_rank)
    weights = on_device(jax.eval_shape(lambda params: build(flatten(params).__getitem__), abstract_params(config)))
    with as_on_device():
        engine = Engine(config, weights, max_length=2 * tokens)
        requests = engine._requests([[0]], [SamplingParams(temperature=0.0, max_tokens=1)])
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), requests)
        lowered = engine._prompts.lower([jax.ShapeDtypeStruct((1, tokens), jnp.int32)], shapes)
        return list(lowered.values())[step]
