"""Hopper's kernels of prompts, run by Pallas' interpreter for Mosaic GPU, against PyTorch in float64."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper_cases import (
    ATTENDED,
    FEED_FORWARDS,
    GATED,
    HEADS,
    gated_call,
    gated_exact,
    heads_call,
    heads_exact,
    products_exact,
)
from kernel_cases import relative_error
from prompt_kernel_cases import (
    FeedForwardCase,
    PromptCase,
    attended_call,
    attended_exact,
    feed_forward_call,
    feed_forward_exact,
    real_queries,
)

from pallas_kernels import (
    Norm,
    Op,
    Projection,
    assume_target,
    attend,
    feed_forward,
    pack,
    prefer,
    project,
    project_heads,
)
from pallas_kernels.hopper import feed_forward_sizes
from pallas_kernels.hopper.feed_forward_sizes import sizes_of
from pallas_kernels.hopper.ring import tiling
from pallas_kernels.target import H200, Target

INTERPRETED = dataclasses.replace(H200, cores=3, interpret=True)  # few, so that each program has several tiles
TOLERANCE = 1e-2


@pytest.mark.parametrize("name", GATED)
def test_gated_products(name: str) -> None:
    case = GATED[name]
    args = gated_call(case, "bfloat16")
    with assume_target(INTERPRETED):
        (got,) = jax.jit(lambda args: project(*args, gate=case.activation, implementation="hopper"))(args)
    assert got.dtype == jnp.bfloat16
    assert relative_error(got, gated_exact(*args, case.activation)) <= TOLERANCE


def test_one_product_that_ends_within_a_tile() -> None:
    x, both = gated_call(GATED["ranks that differ"], "bfloat16")
    with assume_target(INTERPRETED):
        one = pack([Projection(down=both.first[128:], up=both.ups[1])])
        (got,) = jax.jit(lambda args: project(*args, implementation="hopper"))((x, one))
    assert relative_error(got, products_exact(x, both)[1].numpy()) <= TOLERANCE


@pytest.mark.parametrize("name", HEADS)
def test_heads(name: str) -> None:
    *arrays, head_dim = heads_call(HEADS[name], "bfloat16")
    with assume_target(INTERPRETED):
        got = jax.jit(lambda arrays: project_heads(*arrays, head_dim, implementation="hopper"))(arrays)
    for one, want in zip(got, heads_exact(*arrays, head_dim), strict=True):
        assert one.dtype == jnp.bfloat16 and one.shape == want.shape
        assert relative_error(one, want) <= TOLERANCE


@pytest.mark.parametrize("name", FEED_FORWARDS)
def test_feed_forward(name: str) -> None:
    args, options = feed_forward_call(FEED_FORWARDS[name], "bfloat16")
    with assume_target(INTERPRETED):
        got = jax.jit(lambda args: feed_forward(*args, **options, implementation="hopper"))(args)
    assert got.dtype == jnp.bfloat16
    assert relative_error(got, feed_forward_exact(*args, **options)) <= TOLERANCE


@pytest.mark.parametrize("name", ATTENDED)
def test_attention(name: str) -> None:
    q, k, v, visible = attended_call(ATTENDED[name], "bfloat16")
    want, ignoring = attended_exact(q, k, v, visible), dataclasses.replace(visible, padding="ignored")
    with assume_target(INTERPRETED):
        got = jax.jit(lambda *args: attend(*args, implementation="hopper"))(q, k, v, ignoring)
    real = real_queries(visible, q.shape[2])
    assert got.dtype == jnp.bfloat16 and np.isfinite(np.asarray(got, np.float32)).all()
    assert relative_error(np.asarray(got, np.float64)[real], want[real]) <= TOLERANCE


@pytest.mark.parametrize("ranks", [(64,), (320,), (192, 136)])
def test_feed_forward_with_as_short_a_ring_as_there_may_be(
    ranks: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a place less, programs wait for blocks that wait for them, and that is refused."""
    fewest = 5 + -(-max(ranks) // 64)
    args, options = feed_forward_call(FeedForwardCase(256, 192, 128, ranks, 72, "gelu"), "bfloat16")
    monkeypatch.setattr(feed_forward_sizes, "STAGES", (fewest,))
    with assume_target(INTERPRETED):
        got = jax.jit(lambda args: feed_forward(*args, **options, implementation="hopper"))(args)
        monkeypatch.setattr(feed_forward_sizes, "STAGES", (fewest - 1,))
        with pytest.raises(ValueError, match="more than a program can hold"):
            feed_forward(*args, **options, implementation="hopper")
    assert relative_error(got, feed_forward_exact(*args, **options)) <= TOLERANCE


def test_feed_forward_of_a_gate_that_shares_latents() -> None:
    args, options = feed_forward_call(FeedForwardCase(128, 64, 128, (288, 288), 72, "gelu"), "bfloat16")
    x, up, down = args
    one = dataclasses.replace(up, first=up.first[:288], starts=(0, 0))
    with assume_target(INTERPRETED):
        assert sizes_of(x, one, down, "gelu", False).counts == (5,)
        got = jax.jit(lambda args: feed_forward(*args, **options, implementation="hopper"))((x, one, down))
    assert relative_error(got, feed_forward_exact(x, one, down, **options)) <= TOLERANCE


def test_tiles_leave_little_of_the_device_idle() -> None:
    few, many = (tiling(H200, rows, [11008], range(128, 209, 16)) for rows in (512, 4096))
    assert 4 * -(-11008 // few.columns) <= 2 * H200.cores  # two rounds
    assert many.columns == 208  # the last round of many is no matter


def test_refusals_say_why() -> None:
    def low(rank: int, d_out: int = 128, bias: bool = False) -> Projection:
        given = jnp.zeros(d_out, jnp.bfloat16) if bias else None
        return Projection(
            down=jnp.zeros((rank, 40), jnp.bfloat16), up=jnp.zeros((d_out, rank), jnp.bfloat16), bias=given
        )

    x, dense = jnp.zeros((1, 128, 40), jnp.bfloat16), Projection(weight=jnp.zeros((128, 40), jnp.bfloat16))
    table, gate = jnp.zeros((1, 128, 64)), {"gate": "silu"}
    pair, three = pack([low(64)] * 2), pack([low(64)] * 3)
    norm = Norm(jnp.ones(128), 1e-5)
    wide, gelu = jnp.zeros((1, 128, 64), jnp.bfloat16), {"activation": "gelu"}

    def attended(padding: str = "ignored", dtype: str = "bfloat16", **sizes: Any) -> tuple[Any, ...]:
        case = dataclasses.replace(PromptCase(1, 1, 64, 128, (128,)), **sizes)
        *arrays, visible = attended_call(case, dtype)
        return *arrays, dataclasses.replace(visible, padding=padding)

    def layer(up: int = 64, down: int = 64, inner: int = 128) -> tuple[Any, Any]:
        first = Projection(down=jnp.zeros((up, 64), jnp.bfloat16), up=jnp.zeros((inner, up), jnp.bfloat16))
        second = Projection(down=jnp.zeros((down, inner), jnp.bfloat16), up=jnp.zeros((64, down), jnp.bfloat16))
        return pack([first]), pack([second])

    cases: list[tuple[Op, tuple[Any, ...], dict[str, Any], str]] = [
        (project, (x, pair), {}, "2 members"),
        (project, (x, pack([low(64, bias=True), low(64)])), gate, "biases"),
        (project, (x, pack([low(64), dense])), gate, "dense member"),
        (project, (x.astype(jnp.float32), pair), gate, "float32"),
        (project, (x, pair), gate | {"dtype": jnp.float32}, "to float32"),
        (project, (x[:, :100], pair), gate, "100 rows"),
        (project, (x, pack([low(64), low(72)])), gate, "ranks (64, 72)"),
        (project, (x, pack([low(64, 96)] * 2)), gate, "96 columns"),
        (feed_forward, (wide.astype(jnp.float32), *layer()), gelu, "float32"),
        (
            feed_forward,
            (wide, pack([Projection(weight=jnp.zeros((128, 64), jnp.bfloat16))]), layer()[1]),
            gelu,
            "dense projection",
        ),
        (feed_forward, (wide[:, :100], *layer()), gelu, "100 tokens"),
        (feed_forward, (wide, *layer(inner=96)), gelu, "96 columns"),
        (feed_forward, (wide, *layer(up=328)), gelu, "ranks 328, 64"),
        (feed_forward, (wide, *layer(down=328)), gelu, "ranks 64, 328"),
        (attend, attended(), {"softcap": 5.0}, "bounded"),
        (attend, attended(dtype="float32"), {}, "float32"),
        (attend, attended(head_dim=96), {}, "head_dim 96"),
        (attend, attended(tokens=100), {}, "100 queries"),
        (attend, attended(window=9), {}, "a window"),
        (attend, attended(causal=False), {}, "behind them"),
        (attend, attended(padding="blind"), {}, "whose output matters"),
        (project_heads, (x, three, table, table, 128, norm), {}, "norms of heads"),
        (project_heads, (x, three, table[..., :16], table[..., :16], 128), {}, "rotated in 32"),
        (project_heads, (x[:, :64], three, table, table, 128), {}, "64 tokens"),
        (project_heads, (x, pack([low(64, 128), low(64, 64), low(64, 64)]), table, table, 128), {}, "64 columns"),
    ]
    for op, args, options, reason in cases:
        with assume_target(H200), pytest.raises(ValueError, match="hopper refuses") as refused:
            op(*args, **options, implementation="hopper")
        assert reason in str(refused.value)
    with assume_target(Target("cuda", "NVIDIA A100", (8, 0), 108)), pytest.raises(ValueError, match="capability"):
        project(x, pair, **gate, implementation="hopper")


def test_others_serve_what_they_are_faster_at() -> None:
    """Unless these are asked for."""
    for rows, rank, chosen in (
        (512, 1024, "hopper"),
        (4096, 256, "hopper"),
        (8192, 1024, "xla_rounded"),
        (512, 192, "xla_rounded"),
    ):
        x, gate = jax.ShapeDtypeStruct((1, rows, 4096), jnp.bfloat16), jax.ShapeDtypeStruct((11008, rank), jnp.bfloat16)
        down = jax.ShapeDtypeStruct((rank, 4096), jnp.bfloat16)
        packed = jax.eval_shape(lambda down, up: pack([Projection(down=down, up=up)] * 2), down, gate)
        with assume_target(H200):
            assert project.choose(x, packed, gate="silu")[0].name == chosen
            with prefer("hopper"):
                assert project.choose(x, packed, gate="silu")[0].name == "hopper"


def test_few_tokens_go_elsewhere() -> None:
    """A tile fills a multiprocessor, so that with half as many as there are of these half of the device would be idle."""

    def layer(tokens: int) -> tuple[Any, ...]:
        def one(rank: int, d_in: int, d_out: int) -> Any:
            down, up = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((rank, d_in), (d_out, rank)))
            return jax.eval_shape(lambda down, up: pack([Projection(down=down, up=up)]), down, up)

        return jax.ShapeDtypeStruct((64, tokens // 64, 768), jnp.bfloat16), one(320, 768, 3072), one(320, 3072, 768)

    with assume_target(H200):
        assert feed_forward.choose(*layer(32768), activation="gelu")[0].name == "hopper"
        chosen, refusals = feed_forward.choose(*layer(8192), activation="gelu")
        assert chosen.name == "stream" and "52% of the device would be idle" in refusals["hopper"]
