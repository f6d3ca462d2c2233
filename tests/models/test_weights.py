"""Packing a parameter tree for the forward pass: what is asked for, padded, shared and placed."""

import dataclasses
import functools
from collections import Counter

import jax
import numpy as np
import pytest
from compiled_decoder import full
from hf_models import reference

from flashsvd_jax.config import ModelConfig
from flashsvd_jax.factorization import Factorization
from flashsvd_jax.models.decoder import full_logits
from flashsvd_jax.models.weights import build_weights, weights_from_params
from flashsvd_jax.schema import count_params, flatten, nest, schema, stored_names
from pallas_kernels import hardware_rank


def shared_basis() -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """A model whose two layers share the down factors of q and k, and of k and v inside each; the shared names are left out."""
    pair = reference("llama")
    rng = np.random.default_rng(0)
    config, flat = pair.config, flatten(pair.params)
    ranks, shared = {}, {}
    for layer in range(config.num_layers):
        for name, owner in (("q_proj", "q_proj"), ("k_proj", "k_proj"), ("v_proj", "k_proj")):
            site = f"layers_{layer}.self_attn.{name}"
            weight = flat.pop(f"{site}.weight")
            ranks[site] = rank = 7 if name == "q_proj" else 5
            flat[f"{site}.up"] = rng.standard_normal((weight.shape[0], rank)).astype(np.float32)
            if layer == 0 and name == owner:
                flat[f"{site}.down"] = rng.standard_normal((rank, weight.shape[1])).astype(np.float32) * 0.1
            else:
                shared[f"{site}.down"] = f"layers_0.self_attn.{owner}.down"
    return dataclasses.replace(config, factorization=Factorization.of(ranks, shared)), flat


def test_every_parameter_is_asked_for_once_and_every_array_placed_once() -> None:
    pair = reference("qwen3", factorized=True)
    asked, placed, flat = Counter(), [], flatten(pair.params)

    def get(name: str) -> np.ndarray:
        asked[name] += 1
        return flat[name]

    def place(array: np.ndarray) -> jax.Array:
        placed.append(array.size)
        return jax.device_put(array)

    weights = build_weights(pair.config, get, place=place)
    assert asked == Counter(flat.keys())
    leaves = jax.tree.leaves(weights)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    assert len(placed) == len(leaves)
    assert sum(placed) == count_params(pair.config) == sum(array.size for array in flat.values())


def test_padded_ranks_give_the_same_logits() -> None:
    pair = reference("llama_tied", factorized=True)
    tokens = np.arange(26, dtype=np.int32).reshape(2, 13)
    flat = flatten(pair.params)
    padded = build_weights(pair.config, flat.__getitem__, hardware_rank, jax.device_put)
    assert padded.layers[0].down.widths == (16,)
    np.testing.assert_allclose(full(pair.config, padded, tokens), pair.logits(tokens), rtol=0, atol=1e-4)


def test_layers_that_share_a_basis_share_one_array() -> None:
    config, flat = shared_basis()
    owners = config.factorization.owner_by_name
    assert set(stored_names(config)) == flat.keys()
    placed = []

    def place(array: np.ndarray) -> jax.Array:
        placed.append(array.size)
        return jax.device_put(array)

    weights = build_weights(config, lambda name: flat[owners.get(name, name)], place=place)
    first, second = (layer.qkv for layer in weights.layers)
    assert first.first is second.first
    assert first.first.shape == (7 + 5, config.hidden_size)  # v reads what k reads
    assert sum(placed) == count_params(config)


def test_a_shared_basis_computes_what_its_copies_compute() -> None:
    config, flat = shared_basis()
    owners = config.factorization.owner_by_name
    whole = {name: flat[owners.get(name, name)].copy() for name in schema(config)}
    apart = dataclasses.replace(config, factorization=Factorization(config.factorization.ranks))
    tokens = np.arange(18, dtype=np.int32).reshape(2, 9)
    shared = build_weights(config, lambda name: flat[owners.get(name, name)])
    copied = weights_from_params(apart, nest(whole))
    assert count_params(apart) > count_params(config)
    np.testing.assert_allclose(
        full(config, jax.device_put(shared), tokens), full(apart, jax.device_put(copied), tokens), rtol=0, atol=1e-5
    )


def test_every_array_has_a_part_in_the_arithmetic() -> None:
    """An array of another size is an error, so none is left unread."""
    pair = reference("llama_bias", factorized=True)
    flat = flatten(pair.params)
    trace = functools.partial(full_logits, pair.config, tokens=np.zeros((2, 3), np.int32))
    for name in flat:
        if name in ("embed_tokens.weight", "lm_head.up"):
            continue  # their other axis is the vocabulary, which no weight meets
        wrong = {**flat, name: np.zeros([size + 1 for size in flat[name].shape], np.float32)}
        with pytest.raises((TypeError, ValueError)):
            jax.eval_shape(trace, weights_from_params(pair.config, nest(wrong)))
