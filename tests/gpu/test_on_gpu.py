"""What only a GPU can show: the code paths chosen there compute what the CPU does, and the engine's promises hold."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flashsvd_jax import SamplingParams, batch_generate, expect_no_compile
from flashsvd_jax.engine import Engine
from flashsvd_jax.kv_cache import cache_bytes
from flashsvd_jax.model import Model
from flashsvd_jax.models.decoder import full_logits
from flashsvd_jax.random_weights import random_weights
from flashsvd_jax.shapes import shape_config
from pallas_kernels import Projection, hardware_rank, pack, project

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("d_out", "rank", "d_in"), [(40, None, 24), (4096, 1492, 1032), (776, 37, 4104), (88, 409, 8)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_project_against_float64(rows: int, d_out: int, rank: int | None, d_in: int, dtype: str) -> None:
    random = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(random.standard_normal(shape) / shape[-1] ** 0.5, dtype)

    bias = draw(d_out)
    member = Projection(weight=draw(d_out, d_in), bias=bias) if rank is None else Projection(
        down=draw(rank, d_in), up=draw(d_out, rank), bias=bias
    )  # fmt: skip
    x = draw(1, rows, d_in)
    (got,) = jax.jit(project)(x, pack([member], hardware_rank))
    wide = lambda a: np.asarray(a, np.float64)  # noqa: E731
    weight = wide(member.weight) if rank is None else wide(member.up) @ wide(member.down)
    want = wide(x) @ weight.T + wide(bias)
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    assert np.linalg.norm(wide(got) - want) <= tolerance * np.linalg.norm(want)


@pytest.fixture(scope="module")
def model() -> Model:
    """Random weights at a ratio whose ranks are no multiple of anything, in float32 so that errors are not rounding."""
    config = shape_config("tiny", 0.43)
    return Model(config, random_weights(config, "float32"), max_length=200)


def test_generated_tokens_are_those_of_a_plain_loop(model: Model) -> None:
    prompts = [list(range(1, length + 1)) for length in (1, 7, 40, 93)]
    completions = batch_generate(model, prompts, SamplingParams(temperature=0.0, max_tokens=24))
    logits = jax.jit(lambda tokens, mask: full_logits(model.config, model.weights, tokens, mask))
    for prompt, completion in zip(prompts, completions, strict=True):
        tokens = np.zeros((1, 128), np.int32)
        ids = [*prompt, *completion.token_ids]
        tokens[0, : len(ids)] = ids
        best = np.asarray(logits(tokens, np.arange(128)[None] < len(ids)))[0].argmax(-1)
        assert list(completion.token_ids) == best[len(prompt) - 1 : len(ids) - 1].tolist()


def test_batch_chunks_and_repeats_give_the_same_tokens(model: Model) -> None:
    prompts = [[5, 6, 7], [9] * 60]
    params = [SamplingParams(seed=1, top_p=0.9, max_tokens=20), SamplingParams(seed=2, top_k=40, max_tokens=20)]
    together = [c.token_ids for c in batch_generate(model, prompts, params)]
    assert together == [c.token_ids for c in batch_generate(model, prompts, params)]
    small = Model(model.config, model.weights, max_length=200, decode_chunk=3)
    assert together == [batch_generate(small, [q], [p])[0].token_ids for q, p in zip(prompts, params, strict=True)]


def test_nothing_is_compiled_after_warm_up(model: Model) -> None:
    batch_generate(model, [[1, 2, 3]], SamplingParams(max_tokens=9))
    with expect_no_compile():
        options = SamplingParams(max_tokens=20, temperature=0.3, top_k=9, top_p=0.7, min_p=0.1, seed=3, logprobs=5)
        batch_generate(model, [[4, 5, 6, 7]], options)


def test_decode_is_one_command_buffer_without_a_copy_of_the_cache(tmp_path: Path) -> None:
    config = dataclasses.replace(shape_config("tiny"), num_layers=2, windows=(None, None))
    engine = Engine(config, random_weights(config), batch=2, max_length=8192)
    compiled = engine.lower_decode().compile({"xla_dump_to": str(tmp_path), "xla_dump_hlo_as_text": True})
    assert cache_bytes(config, 2, 8192) >= 2**24
    assert compiled.memory_analysis().temp_size_in_bytes < 2**22
    thunks = next(tmp_path.glob("*_decode*thunk_sequence_after_thunk_passes.txt")).read_text()
    if top_level(thunks.splitlines()) == ["kCommandBuffer"]:
        assert "kWhile" in thunks  # the loop over tokens is part of the graph
    else:
        assert top_level(thunks.split("body:")[1].splitlines()) == ["kCommandBuffer"]


def top_level(lines: list[str]) -> list[str]:
    """Kinds of the thunks that are part of no other. A thunk has a line that begins with its number; some have more lines."""
    indent = lambda line: len(line) - len(line.lstrip())  # noqa: E731
    lines = [line for line in lines if re.match(r"\s*\d+: k", line)]
    outermost = min(map(indent, lines))
    return [line.split()[1] for line in lines if indent(line) == outermost]
