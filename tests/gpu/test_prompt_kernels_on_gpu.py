"""The kernels of prompts and encoders on a GPU, against PyTorch in float64 on the CPU; twice, for the same bits."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper_cases import FEED_FORWARDS as HOPPER_FEED_FORWARDS
from hopper_cases import (
    GATED,
    HEADS,
    GatedCase,
    HeadsCase,
    gated_call,
    gated_exact,
    heads_call,
    heads_exact,
    products_exact,
)
from kernel_cases import relative_error
from prompt_kernel_cases import (
    ATTENDED,
    FEED_FORWARDS,
    STREAMED,
    FeedForwardCase,
    PromptCase,
    attended_call,
    attended_exact,
    feed_forward_call,
    feed_forward_exact,
    norm_exact,
    real_queries,
    streamed_call,
    streamed_exact,
)

from flashsvd_jax.encoder_config import EncoderConfig
from flashsvd_jax.encoder_model import EncoderModel
from flashsvd_jax.factorization import Factorization
from flashsvd_jax.models.encoder import hidden_states
from flashsvd_jax.models.encoder_weights import build_encoder_weights
from flashsvd_jax.models.pass_options import encoder_options
from flashsvd_jax.models.sequence_blocks import in_blocks, tokens_together
from flashsvd_jax.random_weights import arrays_of_the_host
from flashsvd_jax.shapes import layer_sites, uniform_rank
from pallas_kernels import (
    LayerNorm,
    Norm,
    Op,
    Projection,
    add_norm,
    attend,
    attend_padded,
    feed_forward,
    hardware_rank,
    pack,
    prefer,
    project,
    project_heads,
)

pytestmark = pytest.mark.gpu

TOLERANCE = {"float32": 1e-5, "bfloat16": 1.2e-2, "float16": 2e-3}
ATTENDED_HERE = ATTENDED | {
    "7b": PromptCase(32, 32, 128, 700, (700, 300)),
    "8b, after others": PromptCase(32, 8, 128, 512, (1536,), start=1024),
    "7b, after others": PromptCase(32, 32, 128, 512, (1600, 1100), start=1088),
    "after others, of which some ended": PromptCase(8, 2, 128, 256, (1300, 1088, 700, 0), start=1088),
    "heads of 64": PromptCase(12, 4, 64, 384, (384, 100)),
    "heads of 256": PromptCase(4, 2, 256, 333, (333,)),
    "bert": PromptCase(12, 12, 64, 512, (512, 100, 0), causal=False),
}
STREAMED_HERE = STREAMED | {
    "bert": PromptCase(12, 12, 64, 512, (512, 100, 0), causal=False, ranks=(29, 32, 44)),
    "modernbert": PromptCase(12, 12, 64, 300, (300,), causal=False, window=65, ranks=(64, 64, 64), rotary=True),
}
FEED_FORWARDS_HERE = FEED_FORWARDS | {
    "bert": FeedForwardCase(1000, 768, 3072, (320,), 320, "gelu", bias=True, residual=True),
    "bert, narrow": FeedForwardCase(1000, 768, 3072, (192,), 192, "gelu", bias=True),
    "modernbert": FeedForwardCase(512, 768, 1152, (240, 240), 240, "gelu"),
}
HOPPER_FEED_FORWARDS_HERE = HOPPER_FEED_FORWARDS | {
    # More tiles than run at once: 67 pairs of 128 tokens.
    "bert": FeedForwardCase(17152, 768, 3072, (320,), 320, "gelu", bias=True),
    "modernbert": FeedForwardCase(1024, 768, 1152, (240, 240), 240, "gelu", residual=True),
}
kinds = pytest.mark.parametrize("dtype", TOLERANCE)


def compare(op: Op, name: str, args: Any, options: dict[str, Any], want: np.ndarray, dtype: str) -> None:
    run = jax.jit(lambda args: op(*args, implementation=name, **options))
    got = run(args)
    assert relative_error(got, want) <= TOLERANCE[dtype]
    assert not np.asarray(got)[~want.any(-1)].any()
    np.testing.assert_array_equal(got, run(args))


@pytest.mark.parametrize("implementation", ["triton", "cudnn", "hopper"])
@pytest.mark.parametrize("name", ATTENDED_HERE)
@kinds
def test_attend(name: str, dtype: str, implementation: str) -> None:
    args = attended_call(ATTENDED_HERE[name], dtype)
    if implementation != "triton":
        if args[3].causal:
            args = (*args[:3], dataclasses.replace(args[3], padding="ignored"))
        with prefer(implementation):
            chosen, refusals = attend.choose(*args)
        if chosen.name != implementation:
            pytest.skip("refused: " + refusals[implementation])
    want = attended_exact(*args)
    if args[3].padding == "ignored":  # only what is no padding is compared
        real = real_queries(args[3], want.shape[1])
        got = jax.jit(lambda args: attend(*args, implementation=implementation))(args)
        assert np.isfinite(np.asarray(got, np.float32)).all()
        assert relative_error(np.asarray(got, np.float64)[real], want[real]) <= TOLERANCE[dtype]
    else:
        compare(attend, implementation, args, {}, want, dtype)


@pytest.mark.parametrize("name", STREAMED_HERE)
@kinds
def test_attend_padded(name: str, dtype: str) -> None:
    args, options = streamed_call(STREAMED_HERE[name], dtype)
    compare(attend_padded, "stream", args, options, streamed_exact(*args, **options), dtype)


def compare_feed_forward(implementation: str, case: FeedForwardCase, dtype: str) -> None:
    args, options = feed_forward_call(case, dtype)
    with prefer(implementation):
        chosen, refusals = feed_forward.choose(*args, **options)
    if chosen.name != implementation:
        pytest.skip(refusals[implementation])
    compare(feed_forward, implementation, args, options, feed_forward_exact(*args, **options), dtype)


@pytest.mark.parametrize("name", FEED_FORWARDS_HERE)
@kinds
def test_feed_forward(name: str, dtype: str) -> None:
    compare_feed_forward("stream", FEED_FORWARDS_HERE[name], dtype)


@pytest.mark.parametrize("name", HOPPER_FEED_FORWARDS_HERE)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_feed_forward_on_hopper(name: str, dtype: str) -> None:
    compare_feed_forward("hopper", HOPPER_FEED_FORWARDS_HERE[name], dtype)


@pytest.mark.parametrize("ratio", [None, 0.5])
def test_a_pass_in_blocks(ratio: float | None, caplog: pytest.LogCaptureFixture) -> None:
    """Two layers of BERT-base, five sequences in blocks of two."""
    hf = {
        "model_type": "bert",
        "hidden_size": 768,
        "num_hidden_layers": 2,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
    }
    hf |= {"vocab_size": 1000, "max_position_embeddings": 512}
    dense = EncoderConfig.from_hf(hf)
    ranks = {site.name: uniform_rank(site, ratio) for site in layer_sites(dense)} if ratio else {}
    config = EncoderConfig.from_hf(hf, Factorization.of(ranks))
    weights = jax.device_put(build_encoder_weights(config, arrays_of_the_host(config), hardware_rank))
    tokens = np.random.default_rng(0).integers(0, 1000, (5, 512))
    lengths = np.array([512, 300, 0, 512, 1])

    def compiled(block_tokens: int | None) -> Any:
        run = partial(in_blocks, partial(hidden_states, config, weights), block_tokens)
        options = encoder_options(weights.layers, tokens_together(*tokens.shape, block_tokens))
        return jax.jit(run, compiler_options=options).lower(tokens, lengths).compile()

    in_one, in_blocks_of_two = compiled(None), compiled(1024)
    whole, blocks = (np.asarray(c(tokens, lengths), np.float64) for c in (in_one, in_blocks_of_two))
    real = np.arange(512) < lengths[:, None]
    assert relative_error(blocks[real], whole[real]) <= 1e-2
    assert "cublas" not in in_blocks_of_two.as_text()  # and so none of its workspace
    for pooling in ("mean", "cls"):
        models = (EncoderModel(config, weights, block_tokens=n) for n in (None, 1024))
        want, got = (model.vectors(tokens, lengths, pooling=pooling, normalize=True) for model in models)
        assert relative_error(got, np.asarray(want, np.float64)) <= 1e-2
    assert "set memory aside" not in caplog.text


@pytest.mark.parametrize("width", [768, 4096, 5120])
@kinds
def test_add_norm(width: int, dtype: str) -> None:
    rng = np.random.default_rng(0)
    x, added = (jnp.asarray(rng.standard_normal((301, width)), dtype) for _ in range(2))
    scale, bias = (jnp.asarray(rng.standard_normal(width), dtype) for _ in range(2))
    for norm in (Norm(scale, 1e-5), LayerNorm(scale, bias, 1e-12)):
        total, normed = jax.jit(lambda *args: add_norm(*args, implementation="triton"))(x, added, norm)
        np.testing.assert_array_equal(total, x + added)
        assert relative_error(normed, norm_exact(x, norm, added)) <= TOLERANCE[dtype]


GATED_HERE = GATED | {
    "7b, one prompt": GatedCase(512, 4096, 11008, (1536, 1536)),
    "7b, eight": GatedCase(4096, 1024, 11008, (1536, 1536)),
    "8b": GatedCase(1152, 1024, 14336, (1920, 1856), "gelu_tanh"),
}
HEADS_HERE = HEADS | {
    "7b, one prompt": HeadsCase(1, 512, 4096, 32, 32, 128, (1024, 1024, 1024)),
    "7b, eight": HeadsCase(8, 512, 1024, 32, 32, 128, (1024, 1024, 1024)),
    "8b": HeadsCase(3, 384, 1024, 32, 8, 128, (1280, 512, 448)),
}
rounded = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])


@pytest.mark.parametrize("name", GATED_HERE)
@rounded
def test_gated_products(name: str, dtype: str) -> None:
    args, options = gated_call(GATED_HERE[name], dtype), {"gate": GATED_HERE[name].activation}
    run = jax.jit(lambda args: project(*args, implementation="hopper", **options))
    (got,) = run(args)
    assert relative_error(got, gated_exact(*args, options["gate"])) <= TOLERANCE[dtype]
    for _ in range(20):  # a race would show
        np.testing.assert_array_equal(got, run(args)[0])


@pytest.mark.parametrize("rows", [128, 512, 4096])
@rounded
def test_second_factors(rows: int, dtype: str) -> None:
    x, both = gated_call(GatedCase(rows, 1024, 4096, (1024, 1536)), dtype)
    one = pack([Projection(down=both.first[1024:], up=both.ups[1])])
    run = jax.jit(lambda args: project(*args, implementation="hopper"))
    (got,) = run((x, one))
    assert relative_error(got, products_exact(x, both)[1].numpy()) <= TOLERANCE[dtype]
    for _ in range(20):
        np.testing.assert_array_equal(got, run((x, one))[0])


@pytest.mark.parametrize("name", HEADS_HERE)
@rounded
def test_project_heads(name: str, dtype: str) -> None:
    *arrays, head_dim = heads_call(HEADS_HERE[name], dtype)
    run = jax.jit(lambda arrays: project_heads(*arrays, head_dim, implementation="hopper"))
    got = run(arrays)
    for one, want in zip(got, heads_exact(*arrays, head_dim), strict=True):
        assert relative_error(one, want) <= TOLERANCE[dtype]
    for _ in range(20):
        jax.tree.map(np.testing.assert_array_equal, got, run(arrays))
