"""Inputs of projections and Fisher information, against what PyTorch's hooks and gradients say of the same models."""

import copy
from collections.abc import Iterator
from typing import Any

import hf_models
import numpy as np
import pytest
import torch
from module_inputs import module_inputs
from torch import nn

from flashsvd_jax.compress.fisher import fisher_statistics
from flashsvd_jax.compress.layer_statistics import AlignedPass, LayerPass
from flashsvd_jax.schema import flatten, sites

TOKENS = np.random.default_rng(0).integers(1, 50, (6, 20)).astype(np.int32)


def torch_inputs(reference: hf_models.Reference) -> dict[str, np.ndarray]:
    """The inputs [tokens, d_in] of each projection of the layers, as float64."""
    return module_inputs(reference.model, projections(reference), TOKENS)


def projections(reference: hf_models.Reference) -> dict[str, nn.Module]:
    """The layers' modules by site."""
    kind, config = reference.config.model_type, reference.config
    names = [name for index in range(config.num_layers) for name in layer_names(config, index)]
    return {name: reference.model.get_submodule(hf_models.hf_path(kind, name)) for name in names}


def layer_names(config: Any, index: int) -> list[str]:
    return [site.name for site in sites(config) if site.name.startswith(f"layers_{index}.")]


@pytest.fixture(params=[1, 4, 64])
def batch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr("flashsvd_jax.compress.layer_statistics.batch_within_workspace", lambda *_: request.param)
    yield request.param


@pytest.mark.parametrize("architecture", hf_models.ARCHITECTURES)
def test_inputs_are_those_of_pytorch(architecture: str) -> None:
    reference = hf_models.reference(architecture)
    config, flat, expected = reference.config, flatten(reference.params), torch_inputs(reference)
    by_moment, by_magnitude = (LayerPass(config, TOKENS, flat.__getitem__, kind) for kind in ("moment", "magnitude"))
    for index in range(config.num_layers):
        moments = by_moment.statistics(index, flat.__getitem__)
        magnitudes = by_magnitude.statistics(index, flat.__getitem__)
        assert list(moments) == list(magnitudes) == layer_names(config, index)
        for name in moments:
            x = expected[name]
            np.testing.assert_allclose(moments[name].moment, x.T @ x, rtol=1e-4, atol=1e-4 * len(x))
            np.testing.assert_allclose(magnitudes[name].magnitude, np.abs(x).sum(0), rtol=1e-4)
        by_moment.advance(index, flat.__getitem__)
        by_magnitude.advance(index, flat.__getitem__)


def test_batches_do_not_matter(batch: int) -> None:
    reference = hf_models.reference("llama")
    flat = flatten(reference.params)
    x = torch_inputs(reference)["layers_1.mlp.down_proj"]
    passed = LayerPass(reference.config, TOKENS, flat.__getitem__, "moment")
    passed.advance(0, flat.__getitem__)
    found = passed.statistics(1, flat.__getitem__)["layers_1.mlp.down_proj"].moment
    assert found is not None and found.dtype == np.float64
    np.testing.assert_allclose(found, x.T @ x, rtol=1e-4, atol=1e-3)


def test_inputs_beside_those_of_the_dense_model(batch: int) -> None:
    """Of a model whose first layer is another one; the other stream goes on with the dense weights."""
    reference = hf_models.reference("llama")
    flat = flatten(reference.params)
    changed = {name: array * (0.5 if name.startswith("layers_0.mlp") else 1) for name, array in flat.items()}
    other = copy.deepcopy(reference.model)
    for linear in (m for m in other.get_submodule("model.layers.0.mlp").modules() if isinstance(m, nn.Linear)):
        linear.weight.data *= 0.5
    passed = AlignedPass(reference.config, TOKENS, flat.__getitem__)
    first = passed.statistics(0, flat.__getitem__)
    assert all(not np.asarray(found.shift).any() for found in first.values())
    passed.advance(0, changed.__getitem__)
    originals = torch_inputs(reference)
    modules = {name: other.get_submodule(hf_models.hf_path("llama", name)) for name in originals}
    inputs = module_inputs(other, modules, TOKENS)
    for name, found in passed.statistics(1, flat.__getitem__).items():
        x, shift = inputs[name], (originals[name] - inputs[name]).T @ inputs[name]
        np.testing.assert_allclose(found.moment, x.T @ x, rtol=1e-4, atol=1e-4 * len(x))
        np.testing.assert_allclose(found.shift, shift, rtol=1e-3, atol=1e-4 * np.abs(shift).max())
        assert np.abs(shift).max() > 0.01 * np.abs(x.T @ x).max()


@pytest.mark.parametrize("architecture", ["llama_tied", "qwen2"])
def test_fisher_information_is_that_of_pytorch(architecture: str) -> None:
    reference = hf_models.reference(architecture)
    linears = projections(reference)
    names = list(linears)
    found = fisher_statistics(reference.config, flatten(reference.params).__getitem__, names, TOKENS, False)
    expected = dict.fromkeys(names, 0.0)
    for window in torch.tensor(TOKENS).long():
        logits = reference.model(window[None, :-1]).logits[0]
        gradients = torch.autograd.grad(
            nn.functional.cross_entropy(logits, window[1:]), [linears[n].weight for n in names]
        )
        for name, gradient in zip(names, gradients, strict=True):
            expected[name] += gradient.double().square().sum(1).numpy()
    for name in names:
        np.testing.assert_allclose(found[name].fisher, expected[name], rtol=1e-3)
