"""Bases that layers share: factors against the published algorithm in numpy and PyTorch, what is stored, what is refused."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import hf_models
import numpy as np
import pytest
import torch
from hf_encoders import build_encoder
from interruptions import content, interrupt_at
from letter_tokenizer import letter_tokenizer
from module_inputs import decoder_linears as linears
from module_inputs import module_inputs
from torch import nn
from truncation import draw_inputs, draw_weight

from converters import convert
from flashsvd_jax import bundled, export
from flashsvd_jax.bundled import DENSE
from flashsvd_jax.checkpoint import load_params, open_folder
from flashsvd_jax.checkpoint.layout import companion_files
from flashsvd_jax.cli import main
from flashsvd_jax.compress import Calibration, Recipe, Target, compress
from flashsvd_jax.compress.allocation import read_ranks
from flashsvd_jax.compress.factors import Loss, factorize
from flashsvd_jax.compress.methods import Statistics
from flashsvd_jax.compress.ranks import Measures, choose_ranks
from flashsvd_jax.compress.shared_bases import bases_of, joined, layer_blocks, summed
from flashsvd_jax.config import ModelConfig
from flashsvd_jax.encoder_model import load_encoder
from flashsvd_jax.encoding import encode
from flashsvd_jax.errors import RequestError
from flashsvd_jax.generation import generate
from flashsvd_jax.inspection import inspect
from flashsvd_jax.model import load
from flashsvd_jax.models.flax_module import Decoder
from flashsvd_jax.schema import count_params
from flashsvd_jax.shapes import kept_share, layer_sites
from flashsvd_jax.tokenizer import Tokenizer

CALIBRATION = Calibration(bundled.CALIBRATION.read_text(encoding="utf-8")[:5000], "text.txt", 4, 48, 1)
LAYERS = 5  # two pairs and one that is left over
SHARING = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # in Llama, as the paper has it


@dataclasses.dataclass(frozen=True)
class Deep:
    """A tiny Llama of more layers than share a basis, float32."""

    model: Any
    folder: Path

    @property
    def config(self) -> ModelConfig:
        return ModelConfig.from_hf(self.model.config.to_dict())

    @property
    def tokens(self) -> np.ndarray:
        return CALIBRATION.windows(Tokenizer(self.folder), self.config)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Deep:
    model = hf_models.build_model("llama", vocab_size=4096, num_hidden_layers=LAYERS)
    place = tmp_path_factory.mktemp("deep")
    model.save_pretrained(place / "hf")
    for file in companion_files(DENSE):
        shutil.copy(file, place / "hf")
    convert(place / "hf", place / "ours", dtype="float32", progress=False)
    return Deep(model, place / "ours")


def inputs(model: nn.Module, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """The inputs [tokens, d_in] of every projection, float64."""
    return module_inputs(model, linears(model), tokens)


def published(weights: list[np.ndarray], moment: np.ndarray, rank: int) -> list[np.ndarray]:
    """Each weight as basis and coefficients make it; row vectors and Cholesky (Wang et al. 2024, section 3)."""
    concatenated = np.concatenate([weight.T for weight in weights], axis=1)
    root = np.linalg.cholesky(moment).T  # upper
    u, s, vt = np.linalg.svd(root @ concatenated, full_matrices=False)
    basis = np.linalg.solve(root, u[:, :rank] * s[:rank])
    return [(basis @ coefficients).T for coefficients in np.split(vt[:rank], len(weights), axis=1)]


def compressed(folder: Path) -> dict[str, np.ndarray]:
    """Each low-rank site's weight as its factors make it, float64."""
    with open_folder(folder) as opened:
        return {
            site: opened.get(f"{site}.up").astype(np.float64) @ opened.get(f"{site}.down")
            for site, _ in opened.config.factorization.ranks
        }


def blocks_of(site: str, size: int) -> list[str]:
    """The sites that share with this one, by the paper's rule."""
    layer, _, kind = site.partition(".")
    index = int(layer.removeprefix("layers_"))
    start = index // size * size
    shares = kind.rpartition(".")[2] in SHARING
    return [f"layers_{i}.{kind}" for i in range(start, min(start + size, LAYERS))] if shares else [site]


@pytest.mark.parametrize("d_out", [24, 40])
@pytest.mark.parametrize("layers", [2, 3])
def test_joined_weights_have_the_factors_of_the_published_algorithm(d_out: int, layers: int) -> None:
    weights = [draw_weight(d_out, 32)[:, ::-1] * (1 + i) + i * np.eye(d_out, 32) for i in range(layers)]
    moments = [(x := draw_inputs("correlated", 32) * (1 + i)).T @ x for i in range(layers)]
    up, down = factorize(np.concatenate(weights), 11, Loss(inputs=np.sum(moments, axis=0)))
    expected = published(weights, np.sum(moments, axis=0), 11)
    for part, one in zip(np.split(up, layers), expected, strict=True):
        np.testing.assert_allclose(part @ down, one, atol=1e-7)


@pytest.mark.parametrize("kind", ["near-singular", "singular", "few", "outliers", "dead"])
def test_on_singular_statistics_the_loss_is_the_tail_of_the_spectrum(kind: str) -> None:
    """Without a root of the sum: joined weights times the inputs of all layers have its singular values."""
    weights = [draw_weight(24, 32), draw_weight(24, 32)[::-1] + np.eye(24, 32)]
    x = np.concatenate([draw_inputs(kind, 32), 3 * draw_inputs(kind, 32)[::-1]])
    joined_weights = np.concatenate(weights)
    up, down = factorize(joined_weights, 9, Loss(inputs=x.T @ x))
    energies = np.linalg.svd(joined_weights @ x.T, compute_uv=False) ** 2
    lost = np.square((joined_weights - up @ down) @ x.T).sum()
    np.testing.assert_allclose(lost, energies[9:].sum(), rtol=1e-6, atol=1e-9 * energies.sum())
    assert np.isfinite(up).all() and np.isfinite(down).all()


def test_sums_of_statistics_keep_what_projections_have_in_common() -> None:
    qkv, other = Statistics(moment=np.eye(2)), Statistics(moment=np.ones((2, 2)))
    more = Statistics(moment=3 * np.eye(2))
    found = summed(summed({}, {"q": qkv, "k": qkv, "up": other}), {"q": more, "k": more, "up": other})
    assert found["q"] is found["k"] and found["q"] is not found["up"]
    np.testing.assert_array_equal(found["q"].moment, 4 * np.eye(2))
    np.testing.assert_array_equal(qkv.moment, np.eye(2))


@pytest.mark.parametrize("size", [2, 3])
def test_a_models_factors_are_those_of_the_published_algorithm(size: int, deep: Deep, tmp_path: Path) -> None:
    compress(deep.folder, tmp_path / "out", Recipe("basis_sharing", 0.5, layers_per_basis=size), CALIBRATION)
    found, measured, dense = compressed(tmp_path / "out"), inputs(deep.model, deep.tokens), linears(deep.model)
    with open_folder(tmp_path / "out") as opened:
        ranks, owners = opened.config.factorization.rank_by_site, opened.config.factorization.owner_by_name
        stored = set(opened.stored_names())
    assert len(found) == len(dense)
    for site in dense:
        members = blocks_of(site, size)
        weights = [dense[name].weight.detach().double().numpy() for name in members]
        (d_out, d_in), number = weights[0].shape, len(members)
        assert ranks[site] == int(0.5 * number * d_out * d_in / (number * d_out + d_in))
        moment = np.sum([measured[name].T @ measured[name] for name in members], axis=0)
        expected = published(weights, moment, ranks[site])[members.index(site)]
        scale = np.linalg.norm(expected @ measured[site].T)
        assert np.linalg.norm((found[site] - expected) @ measured[site].T) < 2e-3 * scale
        assert owners.get(f"{site}.down", f"{site}.down") == f"{members[0]}.down"
        assert (f"{site}.down" in stored) == (site == members[0])


def test_what_is_written_serves_and_says_what_it_shares(
    deep: Deep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["--method", "basis_sharing", "--ratio", "0.5", "--samples", "4", "--length", "48"]
    assert main(["compress", str(deep.folder), str(out), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "= reads a factor that another site stores" in printed
    found = inspect(out)
    assert found.family == "basis_sharing"
    assert found.notes[0].startswith(
        "compressed by basis_sharing, 2 layers to a basis, to 0.5 of the layers' parameters"
    )
    with open_folder(out) as opened:
        assert found.params == count_params(opened.config) == sum(opened.get(n).size for n in opened.stored_names())
        assert 0.47 < kept_share(opened.config) <= 0.5
        logits = Decoder(opened.config).apply(load_params(out), deep.tokens)
    model = copy.deepcopy(deep.model)
    for site, product in compressed(out).items():
        linears(model)[site].weight.data = torch.tensor(product, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor(deep.tokens).long()).logits.numpy()
    np.testing.assert_allclose(np.asarray(logits), expected, rtol=0, atol=1e-4)
    loaded = load(out, dtype="float32", materialize="never")
    assert isinstance(generate(loaded, "def area", max_tokens=3, temperature=0.0), str)


def test_it_is_exported_with_a_copy_for_each_layer(deep: Deep, tmp_path: Path) -> None:
    compress(deep.folder, tmp_path / "out", Recipe("basis_sharing", 0.5), CALIBRATION)
    export(tmp_path / "out", tmp_path / "ab", format="lowrankarena", copy_shared=True)
    convert(tmp_path / "ab", tmp_path / "again", dtype="float32", progress=False)
    found, expected = compressed(tmp_path / "again"), compressed(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[site], expected[site]) for site in found)


def test_an_update_fits_each_layers_coefficients_to_its_own_inputs(deep: Deep, tmp_path: Path) -> None:
    """``coef = (B^T G B)^-1 B^T G W^T`` with inputs that the compressed layers before give, those of the same basis too."""
    compress(deep.folder, tmp_path / "plain", Recipe("basis_sharing", 0.5), CALIBRATION)
    compress(deep.folder, tmp_path / "out", Recipe("basis_sharing", 0.5, update=True), CALIBRATION)
    found, model = compressed(tmp_path / "out"), copy.deepcopy(deep.model)
    with open_folder(tmp_path / "out") as updated, open_folder(tmp_path / "plain") as plain:
        for index in range(LAYERS):
            layer = {name: linear for name, linear in linears(model).items() if name.startswith(f"layers_{index}.")}
            measured = inputs(model, deep.tokens)
            for name, linear in layer.items():
                down = updated.get(f"{name}.down").astype(np.float64)
                assert np.array_equal(down, plain.get(f"{name}.down"))
                x, weight = measured[name], linear.weight.detach().double().numpy()
                up = np.linalg.lstsq(x @ down.T, x @ weight.T)[0].T
                assert np.linalg.norm((found[name] - up @ down) @ x.T) < 1e-3 * np.linalg.norm(up @ down @ x.T)
            for name, linear in layer.items():
                linear.weight.data = torch.tensor(found[name], dtype=torch.float32)


@pytest.mark.parametrize("recipe", [Recipe("basis_sharing", 0.5), Recipe("basis_sharing", 0.5, "greedy", update=True)])
def test_an_interrupted_run_goes_on(
    recipe: Recipe, deep: Deep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compress(deep.folder, tmp_path / "whole", recipe, CALIBRATION)
    for layer in (3, 4):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt_at(patch, layer)
            compress(deep.folder, tmp_path / "out", recipe, CALIBRATION, resume=True)
    kept = {path.name for path in (tmp_path / ".out.resume").iterdir()}
    assert kept >= {"layer_0.safetensors", "layer_2.safetensors"} and "layer_4.safetensors" not in kept
    compress(deep.folder, tmp_path / "out", recipe, CALIBRATION, resume=True)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.parametrize("alloc", ["uniform", "greedy", "v2", "effective", "importance", "fisher"])
@pytest.mark.parametrize("unit", ["ratio", "params"])
def test_a_target_is_kept(alloc: str, unit: Any, deep: Deep, tmp_path: Path) -> None:
    amount = 0.6 if unit == "ratio" else 0.9 * count_params(deep.config)
    compress(deep.folder, tmp_path / "out", Recipe("basis_sharing", Target(unit, amount), alloc), CALIBRATION)
    with open_folder(tmp_path / "out") as opened:
        if unit == "ratio":
            assert 0.57 < kept_share(opened.config) <= 0.6
        else:
            assert 0.98 * amount < count_params(opened.config) <= amount


def test_greedy_counts_every_layer_of_a_basis(deep: Deep) -> None:
    """Each site's own relative loss is one: at equal spectra a pair's rank is worth twice that of a site alone."""
    falling = np.arange(48.0, 0, -1) ** 2
    bases = bases_of(deep.config, 2)
    gains = {site.name: falling[: min(site.d_out, site.d_in)] for site in joined(layer_sites(deep.config), bases)}
    recipe = Recipe("basis_sharing", 0.5, "greedy")
    ranks = choose_ranks(recipe, deep.config, 4, Measures(lambda: gains))
    last = [f"layers_{LAYERS - 1}.mlp.up_proj", "layers_0.mlp.up_proj"]
    assert ranks[last[1]] > ranks[last[0]]


def test_ranks_of_its_own_manifest_give_it_again(deep: Deep, tmp_path: Path) -> None:
    compress(deep.folder, tmp_path / "one", Recipe("basis_sharing", 0.5, "greedy"), CALIBRATION)
    ranks = read_ranks(tmp_path / "one" / "factorization.json").ranks
    compress(deep.folder, tmp_path / "two", Recipe("basis_sharing", None, "file", ranks=ranks), CALIBRATION)
    one, two = compressed(tmp_path / "one"), compressed(tmp_path / "two")
    assert one.keys() == two.keys() and all(np.array_equal(one[site], two[site]) for site in one)


def test_ranks_may_exceed_the_smaller_side_of_one_weight(deep: Deep, tmp_path: Path) -> None:
    """Keys of grouped queries are narrow, a pair of them is not: 16 x 48 each, together up to rank 32."""
    sites = {"layers_0.self_attn.k_proj": 20, "layers_1.self_attn.k_proj": 20}
    compress(deep.folder, tmp_path / "out", Recipe("basis_sharing", None, "file", ranks=sites), CALIBRATION)
    assert isinstance(generate(load(tmp_path / "out"), "def", max_tokens=2, temperature=0.0), str)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"layers_0.mlp.up_proj": 4}, "must have one rank, or none: layers_0.mlp.up_proj 4, layers_1.mlp.up_proj none"),
        ({"layers_0.mlp.up_proj": 4, "layers_1.mlp.up_proj": 5}, "layers_0.mlp.up_proj 4, layers_1.mlp.up_proj 5"),
        ({"layers_4.mlp.up_proj": 49}, "from 1 to 48"),
        ({"layers_9.mlp.up_proj": 4}, "no projection of the model's layers: layers_9.mlp.up_proj"),
    ],
)
def test_given_ranks_are_checked(ranks: dict[str, int], message: str, deep: Deep, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=message):
        compress(deep.folder, tmp_path / "out", Recipe("basis_sharing", None, "file", ranks=ranks), CALIBRATION)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers_per_basis": 1}, "2 layers or more, not by 1; alone, method drone"),
        ({"method": "drone", "layers_per_basis": 2}, "method drone has no bases that layers share"),
        ({"heads": "own"}, "bases that layers share are of whole projections"),
        ({"alloc": "sensitivity"}, "compresses one projection alone, and a basis is of several"),
        ({"target": Target("bytes", 1e6)}, "sharing saves memory alone; give a ratio"),
    ],
)
def test_a_recipe_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Recipe(**{"method": "basis_sharing", "target": 0.5, **options})


def test_more_layers_than_there_are_cannot_share(
    deep: Deep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(deep.folder), str(tmp_path / "out"), "--method", "basis_sharing", "--ratio", "0.5", "--quiet"]
    assert main(["compress", *arguments, "--layers-per-basis", "6"]) == 1
    assert "the model has 5 layers, so 6 cannot share a basis" in capsys.readouterr().err


@pytest.mark.parametrize("architecture", ["phi3", "gpt2", "opt"])
def test_which_projections_share(architecture: str) -> None:
    config = hf_models.reference(architecture).config
    shared = {name.rpartition(".")[2] for name, members in bases_of(config, 2).items() if len(members) == 2}
    assert shared == {"phi3": {"qkv_proj", "gate_up_proj"}, "gpt2": {"qkv_proj", "up_proj"}}.get(
        architecture, {"q_proj", "k_proj", "v_proj", "up_proj"}
    )
    total = sum(site.d_out * site.d_in for site in joined(layer_sites(config), bases_of(config, 2)))
    assert total == sum(site.d_out * site.d_in for site in layer_sites(config))
    assert layer_blocks(5, 2) == [range(2), range(2, 4), range(4, 5)]


def test_encoders_share_bases_too(tmp_path: Path) -> None:
    model = build_encoder("bert")
    model.save_pretrained(tmp_path / "hf")
    letter_tokenizer().save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "ours", dtype="float32", progress=False)
    full = {}
    for name, recipe in {"out": Recipe("basis_sharing", 0.5), "drone": Recipe("drone", 0.5, heads="whole")}.items():
        compress(tmp_path / "ours", tmp_path / name, recipe, dataclasses.replace(CALIBRATION, samples=8, length=32))
        full[name] = json.loads((tmp_path / name / "factorization.json").read_text())
    assert full["out"]["shared"] and not full["drone"]["shared"] and "groups" not in full["out"]
    assert full["out"]["params"] <= 1.02 * full["drone"]["params"]
    found = encode(load_encoder(tmp_path / "out", dtype="float32"), ["abc", "cab bac"])
    expanded = encode(load_encoder(tmp_path / "out", dtype="float32", materialize="always"), ["abc", "cab bac"])
    np.testing.assert_allclose(found, expanded, atol=1e-4)
