"""Generation by models whose steps differ most from Llama's: two rotations, none at all, and a table of positions that ends."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from compiled_decoder import device_weights
from hf_models import reference

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
