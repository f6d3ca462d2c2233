"""Encoders compressed: inputs, factors and hidden states against PyTorch's of the same models, the command, what is refused."""

import copy
import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from converted_encoders import folder_outputs
from hf_encoders import ARCHITECTURES, EncoderReference, build_encoder, canonical_name, encoder_reference
from interruptions import content, interrupt_at
from letter_tokenizer import letter_tokenizer
from module_inputs import module_inputs
from torch import nn
from truncation import best

from converters import convert
from flashsvd_jax import bundled, encode
from flashsvd_jax.checkpoint import open_folder
from flashsvd_jax.cli import main
from flashsvd_jax.cli.compress import HEADS as COMMAND_HEADS
from flashsvd_jax.compress import Calibration, Recipe, Target, compress
from flashsvd_jax.compress.heads import HEADS
from flashsvd_jax.compress.layer_statistics import LayerPass
from flashsvd_jax.encoder_config import EncoderConfig
from flashsvd_jax.encoder_model import load_encoder
from flashsvd_jax.errors import RequestError
from flashsvd_jax.inspection import inspect
from flashsvd_jax.schema import flatten
from flashsvd_jax.shapes import layer_sites
from flashsvd_jax.tokenizer import Tokenizer

TOKENS = np.random.default_rng(0).integers(5, 67, (6, 20)).astype(np.int32)
CALIBRATION = Calibration(bundled.CALIBRATION.read_text(encoding="utf-8")[:4000], "text.txt", samples=8, length=32)


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A model of transformers, as its folder and as ours, float32."""

    model: Any
    hugging_face: Path
    folder: Path

    @property
    def config(self) -> EncoderConfig:
        return EncoderConfig.from_hf(self.model.config.to_dict())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Architecture -> its model; nothing in it may be changed."""

    @cache
    def make(architecture: str) -> Tiny:
        model = build_encoder(architecture)
        place = tmp_path_factory.mktemp(architecture)
        model.save_pretrained(place / "hf")
        letter_tokenizer().save_pretrained(place / "hf")
        convert(place / "hf", place / "ours", dtype="float32", progress=False)
        return Tiny(model, place / "hf", place / "ours")

    return make


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers' projections by site."""
    found = ((canonical_name(name), module) for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return {name: module for name, module in found if name.startswith("layers_")}


def inputs(model: nn.Module, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """The inputs [tokens, d_in] of each projection, float64."""
    return module_inputs(model, linears(model), tokens)


def windows(tiny: Tiny) -> np.ndarray:
    return CALIBRATION.windows(Tokenizer(tiny.folder), tiny.config)


def products(folder: Path) -> dict[str, np.ndarray]:
    """Each low-rank site's weight as its factors make it, float64; those of heads are told by the shape of the second one."""
    found = {}
    with open_folder(folder) as opened:
        for site, rank in opened.config.factorization.ranks:
            down, up = (opened.get(f"{site}.{part}").astype(np.float64) for part in ("down", "up"))
            blocks = [up] if up.ndim == 2 else list(up)
            parts = [block @ down[rank * i : rank * (i + 1)] for i, block in enumerate(blocks)]
            found[site] = np.concatenate(parts)
    return found


def lost(tiny: Tiny, folder: Path) -> float:
    """What the outputs of all projections lose together, each as a share of its own."""
    measured, total = inputs(tiny.model, windows(tiny)), 0.0
    for site, product in products(folder).items():
        weight, x = linears(tiny.model)[site].weight.detach().double().numpy(), measured[site]
        total += np.square((weight - product) @ x.T).sum() / np.square(weight @ x.T).sum()
    return total


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_inputs_are_those_of_pytorch(architecture: str) -> None:
    pair: EncoderReference = encoder_reference(architecture)
    expected, get = inputs(pair.model, TOKENS), flatten(pair.params).__getitem__
    passed = LayerPass(pair.config, TOKENS, get, "moment")
    for index in range(pair.config.num_layers):
        found = passed.statistics(index, get, advance=True)
        assert list(found) == [s.name for s in layer_sites(pair.config) if s.name.startswith(f"layers_{index}.")]
        for name, statistics in found.items():
            x = expected[name]
            np.testing.assert_allclose(statistics.moment, x.T @ x, rtol=1e-4, atol=1e-4 * len(x))


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert", "modernbert"])
@pytest.mark.parametrize("heads", HEADS)
def test_at_full_rank_it_is_the_same_model(architecture: str, heads: str, tiny: Any, tmp_path: Path) -> None:
    model = tiny(architecture)
    made_of_heads = ("q_proj", "k_proj", "v_proj", "qkv_proj")
    ranks = {site.name: min(site.d_out, site.d_in) for site in layer_sites(model.config)}
    if heads == "own":
        ranks |= {name: model.config.head_dim for name in ranks if name.endswith(made_of_heads)}
    compress(model.folder, tmp_path / "out", Recipe("drone", None, "file", ranks=ranks, heads=heads), CALIBRATION)
    found, tokens = folder_outputs(tmp_path / "out", TOKENS), torch.tensor(TOKENS).long()
    np.testing.assert_allclose(found, folder_outputs(model.folder, TOKENS), rtol=0, atol=1e-4)
    with torch.no_grad():
        np.testing.assert_allclose(found, model.model(tokens)[0].numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "method", "heads"),
    [("bert", "drone", "own"), ("modernbert", "drone", "own"), ("bert", "svdllm", "own"), ("bert", "drone", "whole")],
)
def test_outputs_are_the_nearest_ones_of_the_rank_head_by_head(
    architecture: str, method: str, heads: str, tiny: Any, tmp_path: Path
) -> None:
    source: Tiny = tiny(architecture)
    compress(source.folder, tmp_path / "out", Recipe(method, 0.5, heads=heads), CALIBRATION)
    with open_folder(tmp_path / "out") as opened:
        factorization = opened.config.factorization
    of_heads = {} if heads == "whole" else {"q_proj": 5, "k_proj": 5, "v_proj": 5, "qkv_proj": 15}
    found, model, tokens = products(tmp_path / "out"), copy.deepcopy(source.model), windows(source)
    assert found.keys() == linears(model).keys()
    for index in range(source.config.num_layers):
        measured = inputs(model, tokens)
        layer = {name: linear for name, linear in linears(model).items() if name.startswith(f"layers_{index}.")}
        for name, linear in layer.items():
            x, groups = measured[name], of_heads.get(name.rpartition(".")[2], 1)
            weight, rank = linear.weight.detach().double().numpy(), factorization.rank(name)
            d_out, d_in = weight.shape[0] // groups, weight.shape[1]
            assert rank == int(0.5 * d_out * d_in / (d_out + d_in)) and factorization.groups_by_site[name] == groups
            expected = np.concatenate([best(part @ x.T, rank) for part in np.split(weight, groups)])
            assert np.linalg.norm(found[name] @ x.T - expected) < 1e-3 * np.linalg.norm(expected)
            if method == "svdllm":
                linear.weight.data = torch.tensor(found[name]).float()


def test_statistics_of_the_text_pay(tiny: Any, tmp_path: Path) -> None:
    source = tiny("bert")
    for method in ("svd", "asvd", "drone"):
        compress(source.folder, tmp_path / method, Recipe(method, 0.5), CALIBRATION)
    found = {method: lost(source, tmp_path / method) for method in ("svd", "asvd", "drone")}
    assert found["drone"] < 0.95 * found["svd"] and found["drone"] < found["asvd"]


@pytest.mark.parametrize("alloc", ["uniform", "greedy", "v2"])
@pytest.mark.parametrize("unit", ["ratio", "params"])
def test_a_target_is_kept(alloc: str, unit: Any, tiny: Any, tmp_path: Path) -> None:
    source = tiny("bert")
    before = inspect(source.folder)
    weights = sum(site.d_out * site.d_in for site in layer_sites(source.config))
    amount = 0.5 if unit == "ratio" else before.params - weights // 2
    compress(source.folder, tmp_path / "out", Recipe("drone", Target(unit, amount), alloc), CALIBRATION)
    kept = inspect(tmp_path / "out").params - (before.params - weights)
    assert 0.4 * weights < kept <= 0.5 * weights


@pytest.mark.parametrize("form", ["hugging_face", "folder"])
def test_the_command(form: str, tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = getattr(tiny("bert"), form), tmp_path / "out"
    options = ["--method", "drone", "--ratio", "0.5", "--dtype", "float32", "--samples", "4", "--length", "32"]
    assert main(["compress", str(source), str(out), *options]) == 0
    found = inspect(out)
    assert capsys.readouterr().out == f"{found}\n" and "5x3" in str(found)
    assert found.family == "drone"
    assert found.notes[-2] == (
        "compressed by drone to 0.5 of the layers' parameters, uniform ranks, queries, keys and values with factors of"
        " single heads"
    )
    assert "4 windows of 32 tokens of calibration.txt" in found.notes[-1]
    assert encode(load_encoder(out, progress=False), ["some words"], progress=False).shape == (1, 40)
    assert main(["compress", str(source), str(tmp_path / "whole"), *options, "--heads", "whole", "--quiet"]) == 0
    assert {site.groups for site in inspect(tmp_path / "whole").sites} == {1}
    assert "single heads" not in "".join(inspect(tmp_path / "whole").notes)
    assert COMMAND_HEADS == HEADS


@pytest.mark.parametrize("heads", HEADS)
def test_ranks_of_a_manifest_are_of_heads_or_whole_as_it_says(
    heads: str, tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(tiny("bert").folder)
    options = ["--method", "svd", "--dtype", "float32", "--quiet"]
    assert main(["compress", source, str(tmp_path / "one"), *options, "--ratio", "0.2", "--heads", heads]) == 0
    given = ["--ranks", str(tmp_path / "one" / "factorization.json")]
    assert main(["compress", source, str(tmp_path / "two"), *options, *given]) == 0
    assert content(tmp_path / "two").keys() == content(tmp_path / "one").keys()
    assert content(tmp_path / "two")["model.safetensors"] == content(tmp_path / "one")["model.safetensors"]
    other = next(name for name in HEADS if name != heads)
    assert main(["compress", source, str(tmp_path / "three"), *options, *given, "--heads", other]) == 1
    assert f"are for --heads {heads}: leave --heads out" in capsys.readouterr().err


def test_an_update_loses_less_on_inputs_of_compressed_layers(tiny: Any, tmp_path: Path) -> None:
    source = tiny("bert")
    for update in (False, True):
        compress(source.folder, tmp_path / str(update), Recipe("drone", 0.4, update=update), CALIBRATION)
    dense, model = source.model, copy.deepcopy(source.model)
    found = products(tmp_path / "True")
    for name, linear in linears(model).items():
        linear.weight.data = torch.tensor(found[name]).float()
    losses = dict.fromkeys(("False", "True"), 0.0)
    measured = inputs(model, windows(source))
    for folder in losses:
        for name, product in products(tmp_path / folder).items():
            if name.startswith("layers_1.self_attn.") and not name.endswith(
                "o_proj"
            ):  # these inputs no later factor changes
                weight = linears(dense)[name].weight.detach().double().numpy()
                losses[folder] += np.square((weight - product) @ measured[name].T).sum()
    assert losses["True"] < 0.999 * losses["False"]


def test_windows_are_texts_of_their_own(tiny: Any) -> None:
    source = tiny("bert")
    found = windows(source)
    whole = Tokenizer(source.folder).encode(CALIBRATION.text)[1:-1]
    pieces = [whole[start : start + 30] for start in range(0, len(whole) - 29, 30)]
    assert found.shape == (8, 32) and (found[:, 0] == 0).all() and (found[:, -1] == 2).all()
    numbers = [pieces.index(list(row[1:-1])) for row in found]
    assert numbers == sorted(set(numbers))


def test_an_interrupted_run_goes_on(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, recipe = tiny("bert").folder, Recipe("drone", 0.5)
    compress(folder, tmp_path / "whole", recipe, CALIBRATION)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, 1)
        compress(folder, tmp_path / "out", recipe, CALIBRATION, resume=True)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 0)
        compress(folder, tmp_path / "out", recipe, CALIBRATION, resume=True)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe("fwsvd", 0.5), "method fwsvd needs gradients of a loss, and an encoder has none by itself"),
        (Recipe("svd", 0.5, "fisher"), "alloc fisher measures a model's loss, and an encoder has none"),
        (Recipe("svd", 0.5, "sensitivity"), "alloc sensitivity measures a model's loss"),
        (Recipe("svd", 0.5, "learned"), "alloc learned measures a model's loss"),
        (Recipe("svd", Target("bytes", 9e4)), "90,000 bytes of weights a token is for decoding, which encoders do not do"),
        (
            Recipe("svd", None, "file", ranks={"layers_0.self_attn.q_proj": 9}),
            r"the rank of layers_0\.self_attn\.q_proj must be from 1 to 8",
        ),
    ],
)  # fmt: skip
def test_what_is_not_for_encoders_is_refused(recipe: Recipe, message: str, tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=message):
        compress(tiny("bert").folder, tmp_path / "out", recipe, CALIBRATION)
    assert not list(tmp_path.iterdir())


def test_texts_that_do_not_suffice_are_refused(tiny: Any, tmp_path: Path) -> None:
    for change, message in (
        ({"length": 2}, "windows of 2 tokens leave no room beside the tokenizer's special tokens"),
        ({"length": 38}, "length must be from 2 to 37, the model's limit, not 38"),
        ({"samples": 400}, r"has \d+ tokens, \d+ windows of 32; 400 windows need 12800: give a longer text"),
    ):
        with pytest.raises(RequestError, match=message):
            compress(
                tiny("bert").folder, tmp_path / "o", Recipe("drone", 0.5), dataclasses.replace(CALIBRATION, **change)
            )


def test_heads_of_decoders_are_whole(dense: Any, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="factors of single heads are for encoders"):
        compress(dense.folder, tmp_path / "out", Recipe("svd", 0.5, heads="own"))
    with pytest.raises(RequestError, match="heads 'all' is not one of own, whole"):
        Recipe("svd", 0.5, heads="all")
