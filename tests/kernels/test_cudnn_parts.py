"""Attention over two parts of the keys, put together; cuDNN's own part in that is stood in for by plain XLA."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import relative_error
from prompt_kernel_cases import PromptCase, attended_call, attended_exact, real_queries

from pallas_kernels import assume_target, attend, cudnn_parts
from pallas_kernels.target import H200

CASE = PromptCase(4, 2, 64, 150, (333, 200), start=183)


def plain_part(
    q: jax.Array, k: jax.Array, v: jax.Array, *, mask_type: Any, scale: float, q_seqlen: Any = None, kv_seqlen: Any = None
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """What cuDNN gives, NaN where there is no key."""
    k, v = (jnp.repeat(a, q.shape[1] // k.shape[1], axis=1) for a in (k, v))
    scores = scale * jnp.einsum("bhtd,bhsd->bhts", q, k, preferred_element_type=jnp.float32)
    places = jnp.arange(k.shape[2])
    if kv_seqlen is None:
        assert mask_type == "CAUSAL"
        seen = (places[None] <= jnp.arange(q.shape[2])[:, None])[None, None]
    else:
        assert mask_type == "PADDING" and (q_seqlen == q.shape[2]).all()
        seen = (places < kv_seqlen[:, None])[:, None, None]
    scores = jnp.where(seen, scores, -jnp.inf)
    out = jnp.einsum("bhts,bhsd->bhtd", jax.nn.softmax(scores), v.astype(jnp.float32))
    return out.astype(q.dtype), jax.nn.logsumexp(scores, -1)


@pytest.mark.parametrize("start", [183, 1, 0])
@pytest.mark.parametrize("each", [False, True], ids=["all from one place", "each from its own"])
def test_parts_give_what_the_whole_does(start: int, each: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudnn_parts, "_part", plain_part)
    case = dataclasses.replace(CASE, start=start, ends=(start + 150, start + 17))
    q, k, v, visible = attended_call(case, "float32")
    if each:
        visible = dataclasses.replace(visible, start=jnp.array([start, start // 2]))
    want = attended_exact(q, k, v, visible)
    got = cudnn_parts.attend_in_parts(q, k, v, dataclasses.replace(visible, padding="ignored"))
    real = real_queries(visible, 150)
    assert np.isfinite(np.asarray(got)).all()
    assert relative_error(np.asarray(got, np.float64)[real], want[real]) < 1e-5


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"padding": "blind"}, "whose padding matters"), ({"causal": False}, "that see what is behind them"),
        ({"start": None}, "all the tokens whose keys they see"), ({"window": 7}, "a window"),
        ({"real": jnp.ones((2, 333), bool)}, "elsewhere than on the right"),
    ],
)  # fmt: skip
def test_refusals_say_why(change: dict[str, Any], reason: str) -> None:
    q, k, v, visible = attended_call(CASE, "bfloat16")
    ignored = dataclasses.replace(visible, padding="ignored")
    with assume_target(H200):
        assert cudnn_parts.refuses(q, k, v, ignored) is None
        found = cudnn_parts.refuses(q, k, v, dataclasses.replace(ignored, **change))
        assert found is not None and reason in found
        assert attend.choose(q, k, v, ignored)[0].name == "triton"  # unless it is asked for
