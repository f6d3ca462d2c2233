"""Generation by models whose steps differ most from Llama's: two rotations, none at all, and a table of positions that ends."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from compiled_decoder import device_weights
from hf_models import build_model, reference, reference_of

from flashsvd_jax.engine import Engine
from flashsvd_jax.errors import RequestError
from flashsvd_jax.sampling import SamplingParams

PROMPTS = [[3, 5, 7], [9, 4, 8, 11, 2, 33, 21, 12]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=11)


def test_layers_of_two_rotations_take_turns(complete: Callable[..., list[list[int]]]) -> None:
    pair = reference("gemma3", True)
    engine = Engine(pair.config, device_weights(pair), batch=2, max_length=64, decode_chunk=4)
    for prompt, got in zip(PROMPTS, complete(engine, PROMPTS, [GREEDY] * 2), strict=True):
        tokens = torch.tensor([prompt])
        whole = pair.model.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=11)
        assert got == whole[0, len(prompt) :].tolist()


def test_a_request_with_longrope_keeps_one_set_of_factors(complete: Callable[..., list[list[int]]]) -> None:
    """That of the length to which it may grow: short, long though its prompt is short, long as its prompt is."""
    short, long, known = [1.0, 1.1, 1.2], [1.5, 3.0, 6.0], 16

    def model(first: list[float]) -> Any:
        rope = {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": first,
            "long_factor": long,
            "attention_factor": 1.2,
        }
        rope |= {"original_max_position_embeddings": known, "partial_rotary_factor": 0.6}
        return build_model("phi3", sliding_window=None, original_max_position_embeddings=known, rope_parameters=rope)

    pair, always_long = reference_of(model(short)), model(long)
    engine = Engine(pair.config, device_weights(pair), batch=3, max_length=64, decode_chunk=4)
    prompts = [(np.arange(length) * 7 % 60 + 1).tolist() for length in (known - 10, known - 4, known + 5)]
    params = [GREEDY, dataclasses.replace(GREEDY, max_tokens=20), GREEDY]
    models = (pair.model, always_long, pair.model)
    for prompt, given, theirs, got in zip(prompts, params, models, complete(engine, prompts, params), strict=True):
        tokens = torch.tensor([prompt])
        options = {"do_sample": False, "max_new_tokens": given.max_tokens}
        whole = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
        assert got == whole[0, len(prompt) :].tolist()


def test_a_table_of_positions_bounds_prompts_and_completions(complete: Callable[..., list[list[int]]]) -> None:
    pair = reference("gpt2", True)
    weights, limit = device_weights(pair), pair.config.max_position
    with pytest.raises(RequestError, match=f"{limit + 1} tokens are more than the {limit} positions"):
        Engine(pair.config, weights, max_length=limit + 1)
    engine = Engine(pair.config, weights, max_length=limit, decode_chunk=4)
    long = np.arange(limit - 3) % 50
    (got,) = complete(engine, [long.tolist()], [GREEDY])
    tokens = torch.tensor(long[None])
    whole = pair.model.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=3)
    assert got == whole[0, limit - 3 :].tolist()
