"""Which kernels an engine uses: chosen for its target, preferred by name, told afterwards, and the same tokens from all."""

import dataclasses
import itertools
from typing import Any

import jax
import numpy as np
import pytest
from cut_models import first_layers

from flashsvd_jax.background_compile import BackgroundStep
from flashsvd_jax.engine import Engine, check_stall
from flashsvd_jax.errors import KernelError, RequestError
from flashsvd_jax.model import Model
from flashsvd_jax.models.weights import build_weights
from flashsvd_jax.sampling import SamplingParams
from flashsvd_jax.schema import schema
from flashsvd_jax.shapes import shape_config
from pallas_kernels import assume_target, hardware_rank
from pallas_kernels.persistent import stalls
from pallas_kernels.target import H200


def test_an_unknown_name_is_refused_before_anything_is_made(tiny: Any) -> None:
    for make in (Engine, Model):
        with pytest.raises(RequestError, match=r"no kernels named 'fast'; known: auto, .*triton.*xla"):
            make(tiny.config, tiny.weights, max_length=96, kernels="fast")


def test_on_a_cpu_it_is_xla_and_the_engine_says_why(tiny: Any) -> None:
    engine = tiny.new_engine()
    assert engine.kernels_used == {}
    engine.lower_decode()
    assert engine.kernels_used["attend_cached"].keys() == {"xla"}
    assert any(reason.startswith("triton: ") for reason in engine.kernels_used["attend_cached"]["xla"])


def test_interpreted_kernels_give_the_tokens_of_plain_xla() -> None:
    config = first_layers(shape_config("tiny", 0.5), 1, vocab_size=64)
    keys = iter(jax.random.split(jax.random.key(0), 100))
    specs = schema(config)
    weights = build_weights(
        config,
        lambda name: jax.random.normal(next(keys), specs[name].shape) / specs[name].shape[-1] ** 0.5,
        hardware_rank,
    )
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    tokens = {}
    for kernels in ("auto", "xla"):
        with assume_target(dataclasses.replace(H200, interpret=True)):
            engine = Engine(config, weights, max_length=48, kernels=kernels, decode_chunk=3, batch=2)
            blocks = list(engine.generate([[1, 2, 3], [9] * 20], [params] * 2))
        tokens[kernels] = [block.tokens.tolist() for block in blocks]
        used = {op: set(names) for op, names in engine.kernels_used.items()}
        assert used["decode_layers"] == ({"products"} if kernels == "auto" else {"xla"})
        assert ("triton" in used.get("attend_cached", ())) == ("triton" in used["project"]) == (kernels == "auto")
    assert tokens["auto"] == tokens["xla"]


def test_a_kernel_that_gave_up_is_an_error_that_says_where() -> None:
    check_stall(np.zeros(4, np.int32))
    for integer, said in (
        (stalls.of_wait("o up", 5, 17), r"for the input of 'o up' in layer 5, block 17.*kernels='products'"),
        (stalls.of_wait("logits", 250, 131), "for the input of 'logits', block 131"),
        (stalls.of_operand(12), "where operand 12 is"),
    ):
        with pytest.raises(KernelError, match=said):
            check_stall(np.array([integer, 0, 0, 0], np.int32))


def test_the_earliest_stall_comes_before_others() -> None:
    """The largest integer stays: that of the first layer, there of the first step; an operand in another place explains all."""
    steps = [(layer, step) for layer in (0, 1, 249) for step in stalls.STEPS]
    waits = [stalls.of_wait(step, layer, program) for layer, step in steps for program in (0, 131)]
    assert all(a > b for of in (waits[::2], waits[1::2]) for a, b in itertools.pairwise(of))
    assert min(waits) > 0 and max(waits) < stalls.of_operand(0) < stalls.of_operand(10_000) < 2**31


def test_generation_ends_in_that_error(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, call = tiny.new_engine(), BackgroundStep.__call__

    def stalled(step: BackgroundStep, *arguments: Any) -> Any:
        found = call(step, *arguments)
        if not isinstance(found, tuple) or len(found) < 4:  # not of decoding
            return found
        *results, stall = found
        return *results, stall.at[0].set(stalls.of_wait("qkv", 0, 0))

    monkeypatch.setattr(BackgroundStep, "__call__", stalled)
    with pytest.raises(KernelError, match="gave up waiting"):
        list(engine.generate([[1, 2, 3]], [SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)]))
