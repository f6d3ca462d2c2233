"""A pass of an encoder of BERT-base's width, two layers deep, with shapes for weights."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from cuda_compile import lower_for_cuda
from described_device import as_on_device

from flashsvd_jax.encoder_config import EncoderConfig
from flashsvd_jax.factorization import Factorization
from flashsvd_jax.models.encoder import hidden_states
from flashsvd_jax.models.encoder_weights import EncoderWeights, build_encoder_weights
from flashsvd_jax.models.pass_options import encoder_options
from flashsvd_jax.models.sequence_blocks import in_blocks, tokens_together
from flashsvd_jax.schema import abstract_params, flatten, sites
from pallas_kernels import hardware_rank

_BASE: dict[str, Any] = {
    "model_type": "bert", "hidden_size": 768, "num_hidden_layers": 2, "num_attention_heads": 12, "intermediate_size": 3072,
    "vocab_size": 30522, "max_position_embeddings": 512,
}  # fmt: skip


def lower_pass(rank: int | None, batch: int, tokens: int, block_tokens: int | None) -> Any:
    """Dense if the rank is None, else every projection of the layers of that rank."""
    dense = EncoderConfig.from_hf(_BASE)
    names = [site.name for site in sites(dense) if site.name.startswith("layers_")]
    config = dense if rank is None else EncoderConfig.from_hf(_BASE, Factorization.of(dict.fromkeys(names, rank)))

    def build(params: dict[str, Any]) -> EncoderWeights:
        return build_encoder_weights(config, flatten(params).__getitem__, hardware_rank)

    def run(weights: EncoderWeights, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        return in_blocks(partial(hidden_states, config, weights), block_tokens, tokens, lengths)

    weights = jax.eval_shape(build, abstract_params(config))
    given = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((batch, tokens), (batch,)))
    with as_on_device():
        options = encoder_options(weights.layers, tokens_together(batch, tokens, block_tokens))
    return lower_for_cuda(run, weights, *given, compiler_options=options)
