"""An encoder at the width of BERT-base lowers for an H200, whichever implementations its sizes make the ops choose."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from cuda_compile import compile_lowered_by, lower_for_cuda
from encoder_passes import lower_pass

from flashsvd_jax.encoder_config import EncoderConfig
from flashsvd_jax.factorization import Factorization
from flashsvd_jax.models.encoder import outputs
from flashsvd_jax.models.encoder_weights import EncoderWeights, build_encoder_weights
from flashsvd_jax.schema import abstract_params, flatten, sites
from pallas_kernels import ACTIVATIONS, Projection, hardware_rank, pack, project, record
from pallas_kernels.registry import Record

BASE = {
    "hidden_size": 768, "num_hidden_layers": 2, "num_attention_heads": 12, "intermediate_size": 3072, "vocab_size": 30522,
    "max_position_embeddings": 512,
}  # fmt: skip


def low_rank(**fields: Any) -> EncoderConfig:
    """Every projection of the layers at rank 200, but for one of each layer."""
    dense = EncoderConfig.from_hf({**BASE, **fields})
    names = [site.name for site in sites(dense) if not site.name.endswith("o_proj") and site.name.startswith("layers_")]
    return EncoderConfig.from_hf({**BASE, **fields}, Factorization.of(dict.fromkeys(names, 200)))


@pytest.mark.parametrize(("batch", "length", "products"), [(1, 16, "triton"), (64, 512, "xla_rounded")])
@pytest.mark.parametrize("fields", [
    {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
    {"model_type": "modernbert", "architectures": ["ModernBertForSequenceClassification"]},
], ids=["bert", "modernbert"])  # fmt: skip
def test_it_lowers_for_cuda(fields: dict[str, Any], batch: int, length: int, products: str) -> None:
    config = low_rank(**fields)

    def build(params: dict[str, Any]) -> EncoderWeights:
        return build_encoder_weights(config, flatten(params).__getitem__, hardware_rank)

    weights = jax.eval_shape(build, abstract_params(config))
    tokens, mask = (jax.ShapeDtypeStruct((batch, length), dtype) for dtype in (jnp.int32, jnp.bool))
    chosen: Record = {}
    with record(chosen):
        lower_for_cuda(partial(outputs, config), weights, tokens, mask)
    assert set(chosen["attend_padded"]) == {"products"}  # ranks of 200 for a head of 64
    assert set(chosen["feed_forward"]) == {"hopper" if batch > 1 else "products"}
    assert products in chosen["project"]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_lowers_as_a_gate(activation: str) -> None:
    x, weight = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((4, 768), (1152, 768)))
    chosen: Record = {}

    def gated(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, ...]:
        return project(x, pack([Projection(weight=weight), Projection(weight=weight)]), gate=activation)

    with record(chosen):
        lower_for_cuda(gated, x, weight)
    assert set(chosen["project"]) == {"triton"}


@pytest.mark.parametrize("rank", [None, 460], ids=["dense", "rank 460"])
def test_a_pass_in_blocks_takes_the_memory_of_a_block(rank: int | None) -> None:
    """64 x 512 tokens in four blocks: 12 MiB for each array of a block of the model's width, 48 MiB of the inner one."""
    compiled = compile_lowered_by(lower_pass, rank, 64, 512, 8192)
    # The residual stream, what lies between the feed-forward projections twice, and the block's result before it is put in place.
    assert compiled.temp_bytes <= (12 + 2 * 48 + 12 + 1) * 2**20
    assert [thunk.kind for thunk in compiled.loop_body()] == ["kCommandBuffer"]


def test_a_pass_in_small_blocks_sets_nothing_aside_for_a_library() -> None:
    """64 x 128 tokens in blocks of 4096: 6 MiB for each array of a block of the model's width, 24 MiB of the inner one."""
    compiled = compile_lowered_by(lower_pass, None, 64, 128, 4096)
    assert compiled.temp_bytes <= (6 + 24 + 2 * 6 + 1) * 2**20
    assert not [thunk.kind for thunk in compiled.walk() if "Cublas" in thunk.kind]
