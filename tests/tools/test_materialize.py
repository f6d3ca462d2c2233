"""`materialize` wherever a model is loaded: the same logits from every path, and the option on the command line."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from compiled_decoder import full
from folder_logits import folder_logits

from flashsvd_jax.benchmark import bytes_per_token
from flashsvd_jax.checkpoint import load_params, open_folder
from flashsvd_jax.checkpoint.orbax_io import load_orbax, save_orbax
from flashsvd_jax.cli import main
from flashsvd_jax.errors import RequestError
from flashsvd_jax.factorization import MATERIALIZE
from flashsvd_jax.inspection import inspect
from flashsvd_jax.kv_cache import cache_bytes
from flashsvd_jax.model import Model, load
from flashsvd_jax.models.weights import DecoderWeights
from flashsvd_jax.schema import schema, sites
from flashsvd_jax.shapes import shape_config
from pallas_kernels import hardware_rank

TOKENS = np.arange(24, dtype=np.int32).reshape(2, 12)


@pytest.fixture(scope="module")
def orbax_folder(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as an Orbax checkpoint."""
    path = tmp_path_factory.mktemp("orbax") / "model"
    with open_folder(tiny.folder) as folder:
        save_orbax(path, load_params(tiny.folder), folder.hf_config, folder.manifest)
    return path


def structure(weights: DecoderWeights) -> Any:
    return jax.tree.structure(weights), [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(weights)]


@pytest.mark.parametrize("materialize", MATERIALIZE)
def test_every_way_to_load_gives_the_same_model(tiny: Any, orbax_folder: Path, materialize: str) -> None:
    params, config, _, _ = load_orbax(orbax_folder)
    models = [
        load(tiny.folder, materialize=materialize),
        Model.from_params(tiny.model.config, load_params(tiny.folder), materialize=materialize),
        Model.from_params(config, params, materialize=materialize),
    ]
    want = folder_logits(tiny.folder, TOKENS)  # the Flax module, which never expands
    np.testing.assert_allclose(want, tiny.reference.logits(TOKENS), rtol=0, atol=1e-4)
    for model in models:
        assert structure(model.weights) == structure(models[0].weights)
        got = full(tiny.model.config, model.weights, TOKENS)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_auto_is_the_default(tiny: Any) -> None:
    with open_folder(tiny.folder) as folder:
        defaults = [load(tiny.folder), Model.from_params(folder.config, load_params(tiny.folder))]
    for model in defaults:
        assert structure(model.weights) == structure(load(tiny.folder, materialize="auto").weights)
    rank, layer = tiny.model.config.factorization.rank, tiny.model.weights.layers[0]
    assert [rank(f"layers_0.self_attn.{name}_proj") is None for name in "qkv"] == [True, False, False]  # as stored
    assert [up is None for up in layer.qkv.ups] == [True, True, True]  # as loaded
    assert [up is None for up in layer.gate_up.ups] == [True, False]


def test_bytes_per_token_never_exceed_the_dense_models(tiny: Any) -> None:
    read = {m: bytes_per_token(tiny.model.config, load(tiny.folder, materialize=m).weights, 1, 50) for m in MATERIALIZE}
    assert read["auto"] < min(read["always"], read["never"])
    assert {m: inspect(tiny.folder, context=50, materialize=m).bytes_per_step for m in MATERIALIZE} == read


def test_in_another_dtype(tiny: Any) -> None:
    want = full(tiny.model.config, load(tiny.folder).weights, TOKENS)
    for materialize in MATERIALIZE:
        half = load(tiny.folder, dtype="bfloat16", materialize=materialize).weights
        assert {leaf.dtype.name for leaf in jax.tree.leaves(half)} == {"bfloat16"}
        assert np.abs(full(tiny.model.config, half, TOKENS) - want).max() < 0.1 * np.abs(want).max()


def test_other_words_are_refused(tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RequestError, match="materialize 'dense' is not one of auto, never, always"):
        load(tiny.folder, materialize="dense")
    with pytest.raises(RequestError, match="materialize"):
        Model.from_params(tiny.model.config, {}, materialize="dense")
    with pytest.raises(SystemExit):
        main(["generate", str(tiny.folder), "--materialize", "dense"])
    assert "invalid choice: 'dense'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "{model}", "-p", "a", "--max-tokens", "2"],
        ["chat", "{model}"],
        ["perplexity", "{model}", "{text}"],
        ["bench", "{model}", "-p", "8", "-n", "8", "-r", "1"],
    ],
)
def test_commands_pass_it_on(
    tiny: Any, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def note(*args: object, **options: Any) -> None:
        raise RequestError(f"asked for {options['materialize']}")

    monkeypatch.setattr("flashsvd_jax.model.load", note)
    monkeypatch.setattr("flashsvd_jax.benchmark.read_bandwidth", lambda: 1e9)
    text = tmp_path / "text.txt"
    text.write_text("some words")
    arguments = [part.format(model=tiny.folder, text=text) for part in command]
    for extra, expected in (([], "auto"), (["--materialize", "always"], "always")):
        assert main([*arguments, *extra]) == 1
        assert f"asked for {expected}" in capsys.readouterr().err


def test_inspect_passes_it_on(tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tiny.folder), "--materialize", "never"]) == 0
    assert capsys.readouterr().out == f"{inspect(tiny.folder, materialize='never')}\n"


def test_bench_of_a_shape(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """At ratio 0.95 of the tiny shape all ranks are below break-even, yet some, padded, are above."""
    monkeypatch.setattr("flashsvd_jax.benchmark.read_bandwidth", lambda: 1e9)
    options = [
        "--shape",
        "tiny",
        "--ratio",
        "0.95",
        "--dtype",
        "float32",
        "-p",
        "8",
        "-n",
        "8",
        "-r",
        "1",
        "-o",
        "jsonl",
    ]
    read = {}
    for materialize in MATERIALIZE:
        assert main(["bench", *options, "--materialize", materialize]) == 0
        row = json.loads(capsys.readouterr().out.splitlines()[-1])
        read[materialize] = row["bytes_per_token"]
        assert row["ratio"] == pytest.approx(0.95, abs=0.02)
    config = shape_config("tiny", 0.95)
    ranks = config.factorization.rank_by_site
    low_rank = [
        (hardware_rank(ranks[s.name]) * (s.d_out + s.d_in), s.d_out * s.d_in) for s in sites(config) if s.name in ranks
    ]
    assert read["never"] - read["auto"] == 4 * sum(max(factors - dense, 0) for factors, dense in low_rank) > 0
    numbers = sum(spec.size for name, spec in schema(config.dense()).items() if name != "embed_tokens.weight")
    assert read["auto"] <= read["always"] == 4 * numbers + cache_bytes(config, 1, 12, 4)
