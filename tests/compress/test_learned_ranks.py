"""Trained ranks: their gradients against PyTorch's, what they learn of weights that need few ranks, and budgets."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from module_inputs import decoder_linears
from torch import nn

from converters import convert
from flashsvd_jax import bundled
from flashsvd_jax.checkpoint import open_folder
from flashsvd_jax.compress import Calibration, Recipe, Target, compress
from flashsvd_jax.compress import learned_ranks as learned
from flashsvd_jax.compress.budget import Budget
from flashsvd_jax.compress.learned_ranks import WIDTH, Components, learned_ranks, learned_shares, moved
from flashsvd_jax.errors import RequestError
from flashsvd_jax.inspection import inspect
from flashsvd_jax.param_specs import Site
from flashsvd_jax.schema import count_params
from flashsvd_jax.shapes import kept_share, layer_sites
from flashsvd_jax.tokenizer import Tokenizer

CALIBRATION = Calibration(bundled.CALIBRATION.read_text(encoding="utf-8")[:5000], "text.txt", 4, 48, 1)
SITES = [Site("a", 40, 40, "heads", "embed", False), Site("b", 120, 40, "heads", "embed", False)]


def numbers(site: Site, rank: int | None) -> int:
    return site.d_out * site.d_in if rank is None else rank * (site.d_out + site.d_in)


def weights_of(dense: Any) -> dict[str, np.ndarray]:
    with open_folder(dense.folder) as folder:
        return {name: folder.get(name) for name in folder.stored_names()}


def components_of(weights: dict[str, np.ndarray], sites: list[str]) -> dict[str, Components]:
    found = {}
    for site in sites:
        u, s, vt = np.linalg.svd(weights[f"{site}.weight"], full_matrices=False)
        found[site] = Components((u * s).astype(np.float32), vt.astype(np.float32), (site,))
    return found


def tokens_of(dense: Any) -> np.ndarray:
    return CALIBRATION.windows(Tokenizer(dense.folder), dense.config)


def test_shares_are_moved_by_one_number_to_their_mean_within_bounds() -> None:
    sizes = np.array([1.0, 3.0, 2.0])
    np.testing.assert_allclose(moved(np.array([0.2, 0.4, 0.6]), sizes, 0.5), np.array([0.2, 0.4, 0.6]) + 0.5 - 2.6 / 6)
    found = moved(np.array([0.0, 0.5, 5.0]), sizes, 0.6)
    assert found[2] == 1 and found @ sizes / 6 == pytest.approx(0.6) and found[1] - found[0] == pytest.approx(0.5)
    low = moved(np.array([-3.0, 0.5, 0.5]), sizes, 0.3)
    assert 0 < low[0] < 0.05 and low @ sizes / 6 == pytest.approx(0.3)


@pytest.mark.parametrize("ratio", [0.3, 0.55, 0.9])
@pytest.mark.parametrize("multiple", [1, 4])
def test_ranks_keep_to_the_budget_at_other_ratios_too(ratio: float, multiple: int) -> None:
    budget = Budget(ratio * (40 * 40 + 120 * 40), numbers, multiple)
    found = learned_ranks(SITES, ratio, {"a": 0.9, "b": 0.4}, budget)
    used = sum(numbers(site, found[site.name]) for site in SITES)
    assert budget.amount - multiple * (80 + 160) < used <= budget.amount
    assert found["a"] / 20 >= found["b"] / 30 and all(rank % multiple == 0 for rank in found.values())


def test_gradients_are_those_of_pytorch(dense: Any) -> None:
    """Of the loss with Dobi-SVD's gate, components counted from a half on, in every weight at once."""
    weights, window = weights_of(dense), tokens_of(dense)[0]
    linears = decoder_linears(dense.reference.model)
    components = components_of(weights, list(linears))
    shares = dict(zip(linears, np.random.default_rng(0).uniform(0.2, 0.9, len(linears)), strict=True))
    found = learned._gradients(dense.config, weights.__getitem__, components)(shares, window)
    leaves = {name: torch.tensor(share, requires_grad=True) for name, share in shares.items()}
    gated = {}
    for name, linear in linears.items():
        u, s, vt = torch.linalg.svd(linear.weight.detach().double(), full_matrices=False)
        even = linear.weight.numel() / sum(linear.weight.shape)
        place = torch.arange(len(s)) + 0.5
        gate = 0.5 * torch.tanh((leaves[name] * even - place) / (WIDTH * even)) + 0.5
        path = next(path for path, module in dense.reference.model.named_modules() if module is linear)
        gated[f"{path}.weight"] = ((u * s * gate) @ vt).float()
    ids = torch.tensor(window).long()
    logits = torch.func.functional_call(dense.reference.model, gated, (ids[None, :-1],)).logits[0]
    nn.functional.cross_entropy(logits, ids[1:]).backward()
    expected = {name: float(leaf.grad) for name, leaf in leaves.items() if leaf.grad is not None}
    assert expected.keys() == found.keys()
    scale = max(map(abs, expected.values()))
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(value, rel=1e-3, abs=1e-4 * scale)


def test_weights_of_few_components_give_their_ranks_to_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trained model, of which some weights have 2 components. The same on every call; the mean over parameters is the ratio."""
    monkeypatch.setattr(learned, "STEPS", 16)
    convert(bundled.DENSE, tmp_path / "dense", dtype="float32", progress=False)
    with open_folder(tmp_path / "dense") as folder:
        config, weights = folder.config, {name: folder.get(name) for name in folder.stored_names()}
        tokens = Calibration(bundled.CALIBRATION.read_text("utf-8"), "text.txt", 4, 32).windows(
            Tokenizer(folder.path), config
        )
    sites = [
        name.removesuffix(".weight") for name in weights if name.startswith("layers_") and name.endswith("_proj.weight")
    ]
    few = [name for name in sites if name.endswith("o_proj")]
    for name in few:
        u, s, vt = np.linalg.svd(weights[f"{name}.weight"], full_matrices=False)
        weights[f"{name}.weight"] = ((u[:, :2] * s[:2]) @ vt[:2]).astype(np.float32)
    components = components_of(weights, sites)
    found, again = (learned_shares(config, weights.__getitem__, components, 0.5, tokens, False) for _ in range(2))
    assert found == again
    sizes = {name: weights[f"{name}.weight"].size for name in sites}
    assert sum(found[n] * sizes[n] for n in sites) / sum(sizes.values()) == pytest.approx(0.5, abs=1e-6)
    others = [found[name] for name in sites if name not in few]
    assert max(found[name] for name in few) < 0.42 and np.mean(others) > 0.5


@pytest.mark.parametrize("method", ["drone", "svd", "basis_sharing"])
@pytest.mark.parametrize("unit", ["ratio", "params"])
def test_models_keep_to_their_budget(
    method: str, unit: str, dense: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learned, "STEPS", 3)
    left_out = 0.4 * sum(site.d_out * site.d_in for site in layer_sites(dense.config))
    target = Target("ratio", 0.5) if unit == "ratio" else Target("params", count_params(dense.config) - left_out)
    compress(dense.folder, tmp_path / "out", Recipe(method, target, "learned"), CALIBRATION)
    assert "learned ranks" in inspect(tmp_path / "out").notes[0] and len(inspect(tmp_path / "out").notes) == 2
    with open_folder(tmp_path / "out") as opened:
        if unit == "ratio":
            assert 0.45 < kept_share(opened.config) <= 0.5
        else:
            assert target.amount - 0.1 * left_out < count_params(opened.config) <= target.amount


def test_a_text_is_needed(dense: Any, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="alloc learned needs a calibration text"):
        compress(dense.folder, tmp_path / "out", Recipe("svd", 0.5, "learned"))
