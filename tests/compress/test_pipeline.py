"""Folders of compressed models: their factors against algorithms written down with PyTorch and numpy, and what is refused."""

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from module_inputs import decoder_linears as weights
from module_inputs import module_inputs
from torch import nn

from flashsvd_jax import bundled
from flashsvd_jax.checkpoint import FolderWriter, load_params, open_folder
from flashsvd_jax.compress import METHODS, Calibration, Recipe, compress
from flashsvd_jax.compress.alignment import STRENGTHS
from flashsvd_jax.compress.allocation import SENSITIVITY_RATIOS, sensitivity_ranks
from flashsvd_jax.compress.greedy import greedy_ranks
from flashsvd_jax.errors import CheckpointError, RequestError
from flashsvd_jax.generation import generate
from flashsvd_jax.inspection import inspect
from flashsvd_jax.model import load
from flashsvd_jax.models.flax_module import Decoder
from flashsvd_jax.schema import sites
from flashsvd_jax.shapes import kept_share
from flashsvd_jax.tokenizer import Tokenizer

TEXT = bundled.CALIBRATION.read_text(encoding="utf-8")[:5000]
CALIBRATION = Calibration(TEXT, "text.txt", samples=4, length=48, seed=1)


def products(folder: Path) -> dict[str, np.ndarray]:
    """Each low-rank site's weight as its factors make it."""
    with open_folder(folder) as opened:
        return {
            site: opened.get(f"{site}.up") @ opened.get(f"{site}.down") for site, _ in opened.config.factorization.ranks
        }


def inputs(model: nn.Module, tokens: np.ndarray, site: str) -> np.ndarray:
    """The inputs [tokens, d_in] of a site."""
    return module_inputs(model, {site: weights(model)[site]}, tokens)[site]


def whitened(weight: np.ndarray, x: np.ndarray, rank: int) -> np.ndarray:
    """SVD-LLM's truncation, by Cholesky."""
    root = np.linalg.cholesky(x.T @ x)
    u, s, vt = np.linalg.svd(weight @ root, full_matrices=False)
    return np.linalg.solve(root.T, ((u[:, :rank] * s[:rank]) @ vt[:rank]).T).T


@pytest.mark.parametrize("method", ["svdllm", "drone"])
def test_factors_are_those_of_whitening_with_the_inputs_that_the_method_reads(
    method: str, dense: Any, tmp_path: Path
) -> None:
    compress(dense.folder, tmp_path / "out", Recipe(method, 0.5), CALIBRATION)
    found, model = products(tmp_path / "out"), copy.deepcopy(dense.reference.model)
    tokens = CALIBRATION.windows(Tokenizer(dense.folder), dense.config)
    with open_folder(tmp_path / "out") as opened:
        ranks = opened.config.factorization.rank_by_site
    assert len(found) == 7 * dense.config.num_layers
    for index in range(dense.config.num_layers):
        layer = {name: linear for name, linear in weights(model).items() if name.startswith(f"layers_{index}.")}
        measured = {name: inputs(model, tokens, name) for name in layer}
        for name, linear in layer.items():
            expected = whitened(linear.weight.detach().double().numpy(), measured[name], ranks[name])
            scale = np.linalg.norm(expected @ measured[name].T)
            assert np.linalg.norm((found[name] - expected) @ measured[name].T) < 1e-3 * scale
        if METHODS[method].sequential:
            for name, linear in layer.items():
                linear.weight.data = torch.tensor(found[name])


@pytest.mark.parametrize("method", ["saes", "aa_svd"])
def test_aligned_factors_are_those_of_the_papers_with_inputs_of_both_models(
    method: str, dense: Any, tmp_path: Path
) -> None:
    """SAES-SVD's closed form for a strength in its bounds, AA-SVD's for 1, written down with PyTorch and numpy."""
    compress(dense.folder, tmp_path / "out", Recipe(method, 0.5), CALIBRATION)
    found, model = products(tmp_path / "out"), copy.deepcopy(dense.reference.model)
    tokens = CALIBRATION.windows(Tokenizer(dense.folder), dense.config)
    originals = module_inputs(dense.reference.model, weights(dense.reference.model), tokens)
    with open_folder(tmp_path / "out") as opened:
        ranks = opened.config.factorization.rank_by_site
    strengths = np.linspace(*STRENGTHS, 200) if method == "saes" else [1.0]
    for index in range(dense.config.num_layers):
        layer = {name: linear for name, linear in weights(model).items() if name.startswith(f"layers_{index}.")}
        measured = {name: inputs(model, tokens, name) for name in layer}
        for name, linear in layer.items():
            x, weight = measured[name], linear.weight.detach().double().numpy()
            change = weight @ np.linalg.lstsq(x, originals[name] - x)[0].T
            errors = []
            for strength in strengths:
                expected = whitened(weight + strength * change, x, ranks[name])
                errors.append(np.linalg.norm((found[name] - expected) @ x.T) / np.linalg.norm(expected @ x.T))
            assert min(errors) < 2e-3
            if method == "aa_svd" and index > 0:
                plain = whitened(weight, x, ranks[name])
                assert np.linalg.norm((found[name] - plain) @ x.T) > 0.02 * np.linalg.norm(plain @ x.T)
        for name, linear in layer.items():
            linear.weight.data = torch.tensor(found[name])


def test_updated_second_factors_are_least_squares_for_inputs_of_the_compressed_layers(
    dense: Any, tmp_path: Path
) -> None:
    """First factors as without an update; SVD-LLM's update of U, written down with PyTorch and numpy."""
    compress(dense.folder, tmp_path / "plain", Recipe("drone", 0.5), CALIBRATION)
    compress(dense.folder, tmp_path / "out", Recipe("drone", 0.5, update=True), CALIBRATION)
    found, model = products(tmp_path / "out"), copy.deepcopy(dense.reference.model)
    tokens = CALIBRATION.windows(Tokenizer(dense.folder), dense.config)
    assert any(note.endswith("inputs of compressed layers") for note in inspect(tmp_path / "out").notes)
    with open_folder(tmp_path / "out") as updated, open_folder(tmp_path / "plain") as plain:
        for index in range(dense.config.num_layers):
            layer = {name: linear for name, linear in weights(model).items() if name.startswith(f"layers_{index}.")}
            measured = {name: inputs(model, tokens, name) for name in layer}
            for name, linear in layer.items():
                down = updated.get(f"{name}.down").astype(np.float64)
                assert np.array_equal(down, plain.get(f"{name}.down"))
                x, weight = measured[name], linear.weight.detach().double().numpy()
                up = np.linalg.lstsq(x @ down.T, x @ weight.T)[0].T
                scale = np.linalg.norm(up @ down @ x.T)
                assert np.linalg.norm((found[name] - up @ down) @ x.T) < 1e-3 * scale
            for name, linear in layer.items():
                linear.weight.data = torch.tensor(found[name])


def test_sensitivity_is_the_loss_of_the_model_with_one_site_compressed(
    dense: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[float]] = {}

    def keep(sites: Any, budget: Any, losses: dict[str, list[float]]) -> dict[str, int]:
        seen.update(losses)
        return sensitivity_ranks(sites, budget, losses)

    monkeypatch.setattr("flashsvd_jax.compress.ranks.sensitivity_ranks", keep)
    compress(dense.folder, tmp_path / "out", Recipe("svd", 0.5, "sensitivity"), CALIBRATION)
    tokens = torch.tensor(CALIBRATION.windows(Tokenizer(dense.folder), dense.config)).long()
    for name, ratio in (("layers_0.self_attn.v_proj", 2), ("layers_1.mlp.down_proj", 8)):
        model = copy.deepcopy(dense.reference.model)
        linear = weights(model)[name]
        u, s, vt = torch.linalg.svd(linear.weight.detach().double(), full_matrices=False)
        rank = int(SENSITIVITY_RATIOS[ratio] * linear.weight.numel() / sum(linear.weight.shape))
        linear.weight.data = ((u[:, :rank] * s[:rank]) @ vt[:rank]).float()
        with torch.no_grad():
            logits = model(tokens).logits[:, :-1].flatten(0, 1)
        expected = float(nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()))
        assert seen[name][ratio] == pytest.approx(expected, rel=1e-5)
    with open_folder(tmp_path / "out") as opened:
        assert 0.4 < kept_share(opened.config) <= 0.5


@pytest.mark.parametrize("method", ["svd", "fwsvd", "drone"])
def test_gains_by_fisher_information_are_in_units_of_the_models_loss(
    method: str, dense: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What all ranks of a site gain: its own loss at rank 0, times its Fisher information over what errors count in that."""
    seen: dict[str, np.ndarray] = {}

    def keep(sites: Any, budget: Any, found: dict[str, np.ndarray]) -> dict[str, int]:
        seen.update(found)
        return greedy_ranks(sites, budget, found)

    monkeypatch.setattr("flashsvd_jax.compress.ranks.greedy_ranks", keep)
    compress(dense.folder, tmp_path / "out", Recipe(method, 0.6, "fisher"), CALIBRATION)
    model, tokens = dense.reference.model, CALIBRATION.windows(Tokenizer(dense.folder), dense.config)
    for name in ("layers_0.self_attn.k_proj", "layers_1.mlp.down_proj"):
        linear, information = weights(model)[name], 0.0
        for window in torch.tensor(tokens).long():
            loss = nn.functional.cross_entropy(model(window[None, :-1]).logits[0], window[1:])
            information = information + torch.autograd.grad(loss, linear.weight)[0].double().square().numpy()
        weight, x = linear.weight.detach().double().numpy(), inputs(model, tokens, name)
        if method == "svd":
            expected = np.square(weight).sum() * information.mean()
        elif method == "fwsvd":
            expected = (np.square(weight) * information.mean(1, keepdims=True)).sum()
        else:
            expected = np.square(weight @ x.T).sum() * information.mean() / np.square(x).sum(1).sum() * x.shape[1]
        assert seen[name].sum() == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("alloc", ["uniform", "greedy"])
def test_what_is_written_loads_generates_and_says_how_it_was_made(
    method: str, alloc: str, dense: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    compress(dense.folder, out, Recipe(method, 0.6, alloc, 2), CALIBRATION, dtype="bfloat16")
    found = inspect(out)
    assert found.family == method and found.dtype == "bfloat16"
    assert found.sources == inspect(dense.folder).sources
    assert found.notes[0].startswith(f"compressed by {method}") and f"{alloc} ranks in multiples of 2" in found.notes[0]
    assert len(found.notes) == 1 + (method != "svd")
    assert all(site.rank is None or site.rank % 2 == 0 for site in found.sites)
    with open_folder(out) as opened:
        assert 0.5 < kept_share(opened.config) <= 0.605
    model = load(out)
    assert isinstance(generate(model, "def area", max_tokens=3, temperature=0.0), str)


@pytest.mark.parametrize("method", METHODS)
def test_nearly_all_parameters_give_nearly_the_same_model(method: str, dense: Any, tmp_path: Path) -> None:
    """Everything that is no factor, biases too, is as it was; ranks near break-even lose something, and little."""
    losses = {}
    tokens = CALIBRATION.windows(Tokenizer(dense.folder), dense.config)
    expected = dense.reference.logits(tokens)
    for ratio in (0.5, 0.99):
        out = tmp_path / str(ratio)
        compress(dense.folder, out, Recipe(method, ratio), CALIBRATION)
        with open_folder(out) as opened, open_folder(dense.folder) as source:
            for name in opened.stored_names():
                if not name.endswith((".up", ".down")):
                    assert np.array_equal(opened.get(name), source.get(name))
            logits = Decoder(opened.config).apply(load_params(out), jnp.asarray(tokens))
        losses[ratio] = float(np.square(np.asarray(logits) - expected).mean() / expected.var())
    assert losses[0.99] < 0.75 * losses[0.5] < 2


def test_greedy_leaves_sites_dense_that_are_worth_it(dense: Any, tmp_path: Path) -> None:
    compress(dense.folder, tmp_path / "out", Recipe("drone", 0.95, "greedy"), CALIBRATION)
    with open_folder(tmp_path / "out") as opened, open_folder(dense.folder) as source:
        low_rank = opened.config.factorization.rank_by_site
        names = [s.name for s in sites(opened.config) if s.name.startswith("layers_") and s.name not in low_rank]
        assert names
        for name in names:
            assert np.array_equal(opened.get(f"{name}.weight"), source.get(f"{name}.weight"))


def test_windows_lie_side_by_side_and_the_seed_chooses_them(dense: Any) -> None:
    tokenizer = Tokenizer(dense.folder)
    ids = tokenizer.encode(TEXT)
    found = CALIBRATION.windows(tokenizer, dense.config)
    assert found.shape == (4, 48) and found.dtype == np.int32
    starts = [start for start in range(0, len(ids), 48) if any(ids[start : start + 48] == list(row) for row in found)]
    assert len(starts) >= 4
    other = dataclasses.replace(CALIBRATION, seed=5).windows(tokenizer, dense.config)
    assert not np.array_equal(found, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": "x = 1"}, r"text\.txt has \d tokens, 0 windows of 48; 4 windows need 192: give a longer text"),
        ({"samples": 100_000}, r"100000 windows need 4800000"),
        ({"samples": 0}, "samples must be at least 1, not 0"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
        ({"length": 1}, "length must be from 2 to 64, the model's limit, not 1"),
        ({"length": 65}, "length must be from 2 to 64"),
    ],
)
def test_a_text_that_does_not_suffice(change: dict[str, Any], message: str, dense: Any, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=message):
        compress(dense.folder, tmp_path / "out", Recipe("drone", 0.5), dataclasses.replace(CALIBRATION, **change))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "cur"}, "no method named 'cur'"),
        ({"target": 1.5}, r"between 0 and 1, not 1\.5"),
        (
            {"alloc": "fair"},
            "alloc 'fair' is not one of uniform, greedy, fisher, v2, effective, importance, sensitivity, learned, file",
        ),
        ({"multiple": 0}, "multiples of 1 or more"),
        ({"alpha": 0.0}, r"alpha must be above 0, not 0\.0"),
        ({"target": None}, "give either a target, such as a ratio, or ranks"),
        ({"ranks": {"a": 1}}, "give either a target"),
        ({"alloc": "file"}, "alloc is 'file' where ranks are given, and nowhere else"),
        ({"method": "svdllm", "update": True}, "choose method drone"),
        ({"alpha": math.nan}, "alpha must be above 0, not nan"),
    ],
)
def test_a_recipe_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Recipe(**{"method": "svd", "target": 0.5, **options})


def test_a_missing_text_a_taken_place_and_a_factorized_model_are_refused(dense: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RequestError, match="method asvd needs a calibration text"):
        compress(dense.folder, out, Recipe("asvd", 0.5))
    with pytest.raises(RequestError, match="dtype 'int8' is not one of"):
        compress(dense.folder, out, Recipe("svd", 0.5), dtype="int8")
    compress(dense.folder, out, Recipe("svd", 0.5))
    with pytest.raises(CheckpointError, match="out already exists"):
        compress(dense.folder, out, Recipe("svd", 0.5))
    with pytest.raises(RequestError, match=r"factorized already \(svd, 14 low-rank sites\); compress the dense model"):
        compress(out, tmp_path / "again", Recipe("svd", 0.5))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def damaged(dense: Any, folder: Path, name: str, value: float) -> Path:
    """A copy of the dense folder with one number changed."""
    with open_folder(dense.folder) as source, FolderWriter(folder, source.hf_config, source.manifest) as writer:
        for stored in source.stored_names():
            array = source.get(stored).copy()
            if stored == name:
                array.flat[0] = value
            writer.add(stored, array)
    return folder


@pytest.mark.filterwarnings("ignore::flashsvd_jax.checkpoint.WeightWarning")
def test_weights_that_are_not_finite_are_named(dense: Any, tmp_path: Path) -> None:
    name = "layers_1.mlp.up_proj.weight"
    src = damaged(dense, tmp_path / "nan", name, math.nan)
    with pytest.raises(CheckpointError, match=rf"{name} holds NaN or infinity"):
        compress(src, tmp_path / "out", Recipe("svd", 0.5))
    src = damaged(dense, tmp_path / "inf", "layers_0.input_layernorm.scale", math.inf)
    for file in dense.folder.glob("tokenizer*"):
        (src / file.name).write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match=r"inputs of layers_0\.self_attn\.q_proj are not finite"):
        compress(src, tmp_path / "out", Recipe("drone", 0.5), CALIBRATION)
    for alloc, message in (("importance", "layer 0 gives what is not finite"), ("learned", "no finite gradient")):
        with pytest.raises(CheckpointError, match=message):
            compress(src, tmp_path / "out", Recipe("svd", 0.5, alloc), CALIBRATION)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inf", "nan"]


def test_numbers_beyond_the_dtype_are_an_error(dense: Any, tmp_path: Path) -> None:
    src = damaged(dense, tmp_path / "large", "layers_0.mlp.up_proj.weight", 1e12)
    with pytest.raises(CheckpointError, match=r"are not finite.*choose a dtype of a wider range"):
        compress(src, tmp_path / "out", Recipe("svd", 0.5), dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["large"]


def test_an_interruption_leaves_nothing(dense: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flashsvd_jax.compress.layerwise.LayerPass.advance", interrupt)
    with pytest.raises(KeyboardInterrupt):
        compress(dense.folder, tmp_path / "out", Recipe("svdllm", 0.5), CALIBRATION)
    assert not list(tmp_path.iterdir())
