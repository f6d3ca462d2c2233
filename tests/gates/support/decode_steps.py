"""The engine's decode step at the widths of published models, two layers deep, with shapes for weights."""

from typing import Any

import jax
from cut_models import first_layers
from described_device import as_on_device, on_device

from flashsvd_jax.config import ModelConfig
from flashsvd_jax.engine import Engine
from flashsvd_jax.models.weights import DecoderWeights, build_weights
from flashsvd_jax.schema import abstract_params, flatten
from flashsvd_jax.shapes import shape_config
from pallas_kernels import begin_decoding, decode_layers, hardware_rank

LAYERS = 2
_DENSE_AMONG_LOW_RANK = (
    "layers_0.self_attn.v_proj",
    "layers_0.mlp.gate_proj",
    "layers_1.self_attn.o_proj",
    "layers_1.mlp",
)


def two_layers(name: str, kind: str) -> ModelConfig:
    """A published shape cut to two layers: "dense", or low-rank at ratio 0.5, at 0.4 if "lower"; "mixed" has dense sites."""
    config = shape_config(name, {"dense": 1.0, "lower": 0.4}.get(kind, 0.5))
    dense = _DENSE_AMONG_LOW_RANK if kind == "mixed" else ()
    return first_layers(config, LAYERS, dense)


def lower_decode(
    name: str, kind: str, batch: int, max_length: int, kernels: str = "auto", *, greedy: bool = True
) -> Any:
    """The step lowered as on an H200. Only in a process that describes one: the engine lowers for where its weights are."""
    config = two_layers(name, kind)

    def build(params: dict[str, Any]) -> DecoderWeights:
        return build_weights(config, flatten(params).__getitem__, hardware_rank)

    weights = on_device(jax.eval_shape(build, abstract_params(config)))
    with as_on_device():
        return Engine(config, weights, batch=batch, max_length=max_length, kernels=kernels).lower_decode(greedy=greedy)


def decode_slices(xs: jax.Array, arguments: tuple[Any, ...]) -> Any:
    """Steps of the op `decode_layers` on slices of an array, xs [steps, batch, 1, width]."""
    _, layers, norm, head, keys, values, *where = arguments
    carried, keys, values = begin_decoding(*arguments)

    def step(carry: Any, x: jax.Array) -> Any:
        keys, values, carried = carry
        done = decode_layers(x, layers, norm, head, keys, values, *where, carried=carried)
        return (done.keys, done.values, done.carried), done.logits

    return jax.lax.scan(step, (keys, values, carried), xs)
