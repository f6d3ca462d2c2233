"""What the persistent kernel refuses, and that it comes first where it does not."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from persistent_models import DENSE, LOW_RANK, Model, shapes_of

from pallas_kernels import (
    LayerNorm,
    Norm,
    PackedProjection,
    assume_target,
    decode_layers,
    prefer,
)
from pallas_kernels.persistent import layers
from pallas_kernels.target import H200, Target

BFLOAT16 = Model(LOW_RANK[:2], LOW_RANK[:2], norms=True, dtype=jnp.bfloat16)
REFUSED = [
    (dict(batch=9), "9 sequences of 1 tokens"),
    (dict(dtype=jnp.float32), "other than bfloat16"),
    (dict(head_dim=96), "heads of 96 columns"),
    (dict(slots=160), "160 slots, no multiple of 64"),
    (dict(heads=9, kv_heads=1), "more than 8 queries a kv head"),
    (dict(gate="relu"), "a gate of relu; it serves silu, gelu, gelu_tanh"),
    (dict(mlp=(136, 132)), "no multiple of 8"),
    (dict(attention=(136,) * 126, mlp=(64,) * 126, windows=(None,) * 126), "more than 125 layers"),
]


def refusal(arguments: tuple[Any, ...]) -> str | None:
    """Why the kernel refuses a call on an H200; the call must then end with another one."""
    with assume_target(H200), prefer("persistent"):
        chosen, refusals = decode_layers.choose(*arguments)
    assert (chosen.name == "persistent") == ("persistent" not in refusals)
    return refusals.get("persistent")


@pytest.mark.parametrize(
    "model",
    [
        BFLOAT16,
        dataclasses.replace(BFLOAT16, attention=DENSE[:2], mlp=DENSE[:2], biases="qkv"),
        dataclasses.replace(BFLOAT16, attention=(136, None), mlp=(None, 136), biases="all", gate="gelu"),
        dataclasses.replace(
            BFLOAT16, attention=((None, 64, 72, None), 136), mlp=((136, None, 64), None), gate="gelu_tanh"
        ),
        dataclasses.replace(BFLOAT16, batch=4, heads=8, kv_heads=1, head=64, shared=(0, 1), windows=(64, None)),
    ],
)
def test_it_serves_what_it_can(model: Model) -> None:
    assert refusal(shapes_of(model)) is None
    with assume_target(H200):
        assert decode_layers.choose(*shapes_of(model), implementation="persistent")[0].name == "persistent"


@pytest.mark.parametrize(("fields", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_it_refuses_sizes_with_reasons(fields: dict[str, Any], reason: str) -> None:
    assert reason in str(refusal(shapes_of(dataclasses.replace(BFLOAT16, **fields))))


def test_it_refuses_weights_with_reasons() -> None:
    x, (layer, last), norm, head, *rest = shapes_of(dataclasses.replace(BFLOAT16, biases="qkv"))
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.bfloat16)  # noqa: E731
    changed = lambda **fields: (x, (dataclasses.replace(layer, **fields), last), norm, head, *rest)  # noqa: E731
    assert refusal(changed()) is None

    def with_biases(of: PackedProjection, *biases: Any) -> PackedProjection:
        return dataclasses.replace(of, biases=biases)

    bias, other = shape(256), Norm(layer.mlp_norm.scale, 1e-6)
    keys, *others = rest
    shorter = (*keys[1].shape[:2], 64, keys[1].shape[3])
    for arguments, reason in (
        ((shape(2, 2, 256), (layer, last), norm, head, *rest), "2 sequences of 2 tokens"),
        (changed(gate="gelu"), "layers of different gates: gelu and silu"),
        (changed(gate="tanh"), "a gate of silu and tanh"),
        (changed(o=with_biases(layer.o, bias)), "layers that differ"),
        ((x, (layer, last), norm, with_biases(head, shape(200)), *rest), "a bias of the head"),
        (changed(qkv=with_biases(layer.qkv, bias, None, bias)), "layers that differ"),
        (changed(o=dataclasses.replace(layer.o, ups=(shape(2, 128, 68),))), "block-diagonal"),
        (changed(mlp_norm=other), "different eps"),
        (changed(q_norm=Norm(layer.q_norm.scale, 1e-6)), "different eps"),
        ((x, (layer, last), other, head, *rest), "different eps"),
        (changed(q_norm=None), "of queries or of keys alone"),
        (changed(k_norm=None), "of queries or of keys alone"),
        (changed(q_norm=None, k_norm=None), "layers that differ"),
        ((x, (layer, last), norm, head, (keys[0], shape(*shorter)), *others), "different shapes"),
        (changed(input_norm=LayerNorm(shape(256), shape(256), 1e-5)), "LayerNorms"),
        ((x, (layer, last), Norm(norm.scale, 1e-5, 1.0), head, *rest), "an offset to their scale"),
        (changed(k_norm=Norm(layer.k_norm.scale, 1e-5, 1.0)), "an offset to their scale"),
        (changed(mlp_out_norm=norm), "norms over what is added"),
        (changed(attention_out_norm=norm), "norms over what is added"),
        (changed(gate_up=dataclasses.replace(layer.gate_up, widths=layer.gate_up.widths[:1])), "without a gate"),
        (changed(scale=0.2), "scores scaled otherwise"),
        (changed(softcap=50.0), "or bounded"),
        (changed(rotation=1), "differ between layers"),
        ((x, (layer, last), norm, head, keys, others[0], *(shape(2, 1, 32),) * 2, others[-1]), "all columns of a head"),
    ):
        assert reason in str(refusal(arguments))


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        (Target("cpu"), "not cpu"),
        (Target("cuda", "NVIDIA A100", (8, 0), 108), "not NVIDIA A100"),
        (dataclasses.replace(H200, interpret=True), "interpreter"),
    ],
)
def test_it_is_for_one_device(device: Target, reason: str) -> None:
    assert layers.unavailable(H200) is None
    assert reason in str(layers.unavailable(device))
    with assume_target(device), prefer("persistent"):
        chosen, refusals = decode_layers.choose(*shapes_of(BFLOAT16))
    assert chosen.name != "persistent" and reason in refusals["persistent"]


def test_it_comes_first_unless_another_is_preferred() -> None:
    arguments = shapes_of(BFLOAT16)
    with assume_target(H200):
        assert decode_layers.choose(*arguments)[0].name == "persistent"
        for name, chosen in (("products", "products"), ("xla_rows", "products"), ("xla", "xla")):
            with prefer(name):
                assert decode_layers.choose(*arguments)[0].name == chosen
