"""Encoders whose queries, keys and values have factors of single heads, against transformers with the products put in."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
import torch
from hf_encoders import build_encoder, canonical_encoder, canonical_name

from flashsvd_jax.checkpoint import Manifest, load_params, save_params
from flashsvd_jax.encoder_config import EncoderConfig
from flashsvd_jax.encoder_model import EncoderModel
from flashsvd_jax.errors import CheckpointError
from flashsvd_jax.factorization import Factorization
from flashsvd_jax.inspection import inspect
from flashsvd_jax.models.encoder import outputs
from flashsvd_jax.models.encoder_weights import build_encoder_weights, encoder_weights_from_params
from flashsvd_jax.models.expansion import expanded_sites
from flashsvd_jax.schema import check_shapes, count_params, flatten, nest, sites
from pallas_kernels import hardware_rank

TOKENS = np.random.default_rng(0).integers(5, 67, (2, 9)).astype(np.int32)
MASK = np.array([[1] * 9, [0] * 3 + [1] * 6], np.int32)
ATTENTION_INPUTS = ("q_proj", "k_proj", "v_proj", "qkv_proj")


def with_heads(architecture: str) -> tuple[Any, EncoderConfig, dict[str, np.ndarray]]:
    """A model of transformers, and its values with the attention's inputs as factors of single heads; ranks differ."""
    model = build_encoder(architecture)
    config = EncoderConfig.from_hf(model.config.to_dict())
    linears = {canonical_name(name): part for name, part in model.named_modules()}
    arrays, rng, ranks, groups = canonical_encoder(model), np.random.default_rng(1), {}, {}
    for index, site in enumerate(found for found in sites(config) if found.name.endswith(ATTENTION_INPUTS)):
        rank, heads = 2 + index, site.d_out // config.head_dim
        del arrays[f"{site.name}.weight"]
        ranks[site.name], groups[site.name] = rank, heads
        down = rng.standard_normal((heads, rank, site.d_in)) * site.d_in**-0.5
        up = rng.standard_normal((heads, config.head_dim, rank)) * rank**-0.5
        arrays[f"{site.name}.down"] = down.reshape(heads * rank, site.d_in).astype(np.float32)
        arrays[f"{site.name}.up"] = up.astype(np.float32)
        with torch.no_grad():
            linears[site.name].weight.copy_(
                torch.tensor(np.concatenate([u @ d for u, d in zip(up, down, strict=True)]))
            )
    factorization = Factorization.of(ranks, groups=groups)
    return model, dataclasses.replace(config, factorization=factorization), arrays


def expected(model: Any) -> np.ndarray:
    """Hidden states of the real tokens; positions count these alone."""
    positions = (MASK.cumsum(1) - 1).clip(0) + (
        model.config.pad_token_id + 1 if "rob" in model.config.model_type else 0
    )
    given = {} if model.config.model_type == "modernbert" else {"position_ids": torch.tensor(positions)}
    with torch.no_grad():
        found = model(torch.tensor(TOKENS).long(), attention_mask=torch.tensor(MASK), **given)[0].numpy()
    return found[MASK == 1]


@pytest.mark.parametrize("materialize", ["never", "auto", "always"])
@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert", "modernbert", "modernbert_bias"])
def test_hidden_states(architecture: str, materialize: str) -> None:
    model, config, arrays = with_heads(architecture)
    check_shapes(config, {name: array.shape for name, array in arrays.items()}, architecture)
    expand = expanded_sites(config, materialize, hardware_rank)
    weights = build_encoder_weights(config, arrays.__getitem__, hardware_rank, jax.device_put, expand)
    assert any(up is not None and up.ndim == 3 for up in weights.layers[0].qkv.ups) == (materialize == "never")
    got = np.asarray(jax.jit(outputs, static_argnums=0)(config, weights, TOKENS, MASK))
    np.testing.assert_allclose(got[MASK == 1], expected(model), rtol=0, atol=1e-5)


def test_bfloat16_is_near() -> None:
    model, config, arrays = with_heads("bert")
    get = lambda name: arrays[name]  # noqa: E731
    weights = build_encoder_weights(config, get, hardware_rank, jax.device_put, dtype="bfloat16")
    got = np.asarray(jax.jit(outputs, static_argnums=0)(config, weights, TOKENS, MASK), np.float32)
    want = expected(model)
    assert np.linalg.norm(got[MASK == 1] - want) <= 0.03 * np.linalg.norm(want)


def test_a_folder_keeps_them_and_inspect_shows_them(tmp_path: Any) -> None:
    model, config, arrays = with_heads("bert")
    manifest = Manifest(
        family="flashsvd_encoder",
        dtype="float32",
        factorization=config.factorization,
        params=sum(array.size for array in arrays.values()),
        params_dense=count_params(config.dense()),
    )
    save_params(tmp_path / "out", nest(arrays), config, model.config.to_dict(), manifest)
    params = load_params(tmp_path / "out")
    assert all(np.array_equal(array, arrays[name]) for name, array in flatten(params).items())
    got = np.asarray(outputs(config, encoder_weights_from_params(config, params), TOKENS, MASK))
    np.testing.assert_allclose(got[MASK == 1], expected(model), rtol=0, atol=1e-5)
    found = inspect(tmp_path / "out", materialize="never")
    site = found.site("layers_0.self_attn.k_proj")
    assert site is not None and (site.rank, site.groups) == (3, config.num_heads)
    held = sum(arrays[f"layers_0.self_attn.k_proj.{part}"].size for part in ("down", "up"))
    assert site.kept == pytest.approx(held / (site.d_out * site.d_in))
    assert f"{config.num_heads}x3 {held / (site.d_out * site.d_in):.0%}" in str(found)
    assert "x so many heads" in str(found)
    loaded = EncoderModel.from_params(config, params, materialize="never")
    assert found.weight_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.weights))


def test_groups_that_do_not_fit_are_refused() -> None:
    _, config, arrays = with_heads("modernbert")
    site = "layers_0.self_attn.qkv_proj"
    of = lambda groups: dataclasses.replace(config, factorization=Factorization.of({site: 2}, groups=groups))  # noqa: E731
    shapes = {name: array.shape for name, array in arrays.items()}
    for groups, words in (
        ({site: 7}, "has 120 outputs, which do not form 7 equal groups"),
        ({"layers_0.mlp.down_proj": 2}, "groups the outputs of dense sites: layers_0.mlp.down_proj"),
        ({"nothing": 2}, "names sites the model does not have: nothing"),
    ):
        with pytest.raises(CheckpointError, match=words):
            check_shapes(of(groups), shapes, "a model")
    four = {"down": np.zeros((8, 40), np.float32), "up": np.zeros((4, 30, 2), np.float32)}
    given = {**arrays, **{f"{site}.{part}": array for part, array in four.items()}}
    with pytest.raises(CheckpointError, match="stands for 3 has 4 groups"):
        build_encoder_weights(of({site: 4}), lambda name: given.get(name))
