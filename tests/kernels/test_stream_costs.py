"""What streaming and products are estimated to take, and that a call goes where it takes less."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import (
    PackedProjection,
    Projection,
    Visible,
    assume_target,
    attend_padded,
    feed_forward,
    pack,
    prefer,
)
from pallas_kernels.target import H200
from pallas_kernels.triton.stream_costs import MARGIN, AttentionCall, FeedForwardCall, estimates, slower
from pallas_kernels.tuned import table

A100 = dataclasses.replace(H200, kind="NVIDIA A100", capability=(8, 0), cores=108)
TABLE = table("pallas_kernels.triton", H200.kind, "streaming")
BERT = {"width": 768, "heads": 12, "kv_heads": 12, "head_dim": 64}


def shape(*sizes: int, dtype: Any = jnp.bfloat16) -> Any:
    return jax.ShapeDtypeStruct(sizes, dtype)


def low_rank(width: int, d_out: int, rank: int, dtype: Any) -> PackedProjection:
    return jax.eval_shape(
        lambda down, up: pack([Projection(down=down, up=up)]),
        shape(rank, width, dtype=dtype),
        shape(d_out, rank, dtype=dtype),
    )


def layer(tokens: int, rank: int, dtype: Any = jnp.bfloat16) -> tuple[Any, ...]:
    """Operands of BERT-base's feed-forward layer."""
    x = shape(1, tokens, 768, dtype=dtype)
    return x, low_rank(768, 3072, rank, dtype), low_rank(3072, 768, rank, dtype)


@pytest.mark.parametrize("kind", [FeedForwardCall, AttentionCall])
def test_a_measured_call_takes_what_was_measured(kind: Any) -> None:
    assert TABLE[kind.op]
    for entry in TABLE[kind.op]:
        fields = {name: tuple(v) if isinstance(v, list) else v for name, v in entry["call"].items()}
        with assume_target(H200):
            found = estimates(kind(**fields))
        assert found is not None
        assert {way: found[way] for way in entry["ms"]} == pytest.approx(entry["ms"])


def test_twice_the_tokens_take_twice_the_time() -> None:
    with assume_target(H200):
        once, twice = (estimates(FeedForwardCall(n * 132 * 128, 768, 3072, (320,), 320)) for n in (1, 2))
    assert once is not None and twice is not None
    assert twice == pytest.approx({way: 2 * ms for way, ms in once.items()}, rel=0.1)


def test_few_tokens_fill_few_cores_and_go_by_products() -> None:
    args, options = layer(256, 320), {"activation": "gelu"}
    with assume_target(H200):
        chosen, refusals = feed_forward.choose(*args, **options)
        assert chosen.name == "products"
        assert (
            refusals["stream"].startswith("streaming would take about 0.0") and "ms, products 0.0" in refusals["stream"]
        )
        assert feed_forward.choose(*args, **options, implementation="stream")[0].name == "stream"
        with prefer("stream"):
            assert feed_forward.choose(*args, **options)[0].name == "stream"
        assert feed_forward.choose(*layer(8192, 320), **options)[0].name == "stream"


def test_streaming_may_take_a_little_longer_as_it_needs_less_memory() -> None:
    """Of a block of 8192 tokens at BERT-base's ratio 0.5."""
    call = FeedForwardCall(8192, 768, 3072, (320,), 320)
    with assume_target(H200):
        times = estimates(call)
        assert times is not None and times["products"] < times["stream"] < (1 + MARGIN) * times["products"]
        assert slower(call) is None


@pytest.mark.parametrize(("device", "dtype"), [(A100, jnp.bfloat16), (H200, jnp.float32)])
def test_what_was_not_measured_streams(device: Any, dtype: Any) -> None:
    with assume_target(device):
        assert feed_forward.choose(*layer(256, 200, dtype), activation="gelu")[0].name == "stream"


def test_long_sequences_of_large_ranks_are_expanded() -> None:
    """Each pair of a query and a key costs twice a rank of 100, which is padded to 128, and twice 64 columns of a head."""
    with assume_target(H200):
        short, long = (AttentionCall(1, n, n, latents=3600, ranks=(100,) * 3, **BERT) for n in (128, 8192))
        assert slower(short) is None
        assert (slower(long) or "").startswith("streaming would take about")
        windowed = dataclasses.replace(long, seen=129)
        assert slower(windowed) is None


@pytest.mark.parametrize(
    ("causal", "window", "seen"), [(True, None, 256), (False, None, 256), (True, 40, 40), (False, 40, 79)]
)
def test_a_window_bounds_what_is_seen(causal: bool, window: int | None, seen: int) -> None:
    x, qkv = shape(2, 256, 768), low_rank(768, 768, 64, jnp.bfloat16)
    qkv = dataclasses.replace(qkv, ups=qkv.ups * 3, biases=(None,) * 3, starts=(0,) * 3, widths=(64,) * 3)
    visible = Visible(shape(2, dtype=jnp.int32), causal=causal, window=window)
    assert AttentionCall.of(x.shape, qkv, visible, 64, False) == AttentionCall(
        2, 256, seen, latents=64, ranks=(64,) * 3, **BERT
    )
    with assume_target(H200):
        assert attend_padded.choose(x, qkv, visible, head_dim=64)[0].name == "stream"
