"""The rows of `flashsvd bench`: what they count, and that the three forms of output say the same."""

import copy
import csv
import io
import json
from pathlib import Path

import pytest
import torch
import transformers

from flashsvd_jax.benchmark import measure, measure_end_to_end
from flashsvd_jax.cli import main
from flashsvd_jax.errors import RequestError
from flashsvd_jax.kv_cache import cache_bytes
from flashsvd_jax.random_weights import random_weights
from flashsvd_jax.schema import count_params, schema
from flashsvd_jax.shapes import (
    SHAPES,
    kept_share,
    layer_sites,
    mixed_config,
    partly_dense_config,
    rank_layout,
    shape_config,
)


def test_a_decode_row_counts_the_bytes_that_a_step_reads() -> None:
    config = shape_config("tiny", 0.5)
    pp, tg = measure(
        config, random_weights(config, "float32"), name="tiny", batch=2, context=16, new_tokens=8, repeats=2, bandwidth=1e9
    )  # fmt: skip
    assert (pp.suite, pp.test, tg.suite, tg.test) == ("prefill", "pp16", "decode", "tg8 @ d16")
    factors = sum(spec.size for name, spec in schema(config).items() if name != "embed_tokens.weight")
    least = 4 * factors + cache_bytes(config, 2, 20, 4)
    assert least <= tg.bytes_per_token <= 1.1 * least  # padded ranks read a little more
    assert tg.floor_ms == pytest.approx(1e3 * tg.bytes_per_token / 1e9, rel=1e-3)
    assert tg.compiled == 4 and 0 < tg.fraction_of_bandwidth == pytest.approx(tg.floor_ms / tg.ms_per_token, rel=1e-2)
    assert tg.tokens_per_s == pytest.approx(2e3 / tg.ms_per_token, rel=1e-2)
    assert tg.total_ms >= 8 * tg.ms_per_token and (tg.impl, tg.ratio, tg.ranks) == ("flashsvd_jax", 0.4959, "uniform")


def test_an_end_to_end_row_counts_a_whole_request() -> None:
    config = shape_config("tiny")
    weights = random_weights(config, "float32")
    (row,) = measure_end_to_end(
        config, weights, name="tiny", batch=2, context=16, new_tokens=9, repeats=1, bandwidth=1e9, kernels="xla"
    )
    assert (row.suite, row.test, row.impl, row.ranks) == ("end-to-end", "pp16+tg9", "flashsvd_jax-xla", "dense")
    assert row.new_tokens == 9 and row.ms_per_token == pytest.approx(row.total_ms / 9, rel=1e-3)
    assert row.tokens_per_s == pytest.approx(2e3 / row.ms_per_token, rel=1e-2)
    assert row.total_ms > row.prefill_ms and row.floor_ms is None and "project=xla" in row.kernels.split(", ")


@pytest.mark.parametrize("name", SHAPES)
def test_published_shapes_have_the_published_ranks(name: str) -> None:
    assert not shape_config(name).factorization
    ranks = shape_config(name, 0.5).factorization.rank_by_site
    if name == "llama-2-7b":
        assert ranks["layers_31.self_attn.q_proj"] == 1024 and ranks["layers_0.mlp.down_proj"] == 1492
    assert "lm_head" not in ranks


@pytest.mark.parametrize("name", SHAPES)
def test_published_shapes_have_the_parameters_that_transformers_counts(name: str) -> None:
    hf = transformers.AutoConfig.for_model(**copy.deepcopy(SHAPES[name]))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(hf)
    assert count_params(shape_config(name)) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("ratio", [0.8, 0.5])
def test_mixed_ranks_hold_what_uniform_ones_hold(name: str, ratio: float) -> None:
    uniform, mixed = shape_config(name, ratio), mixed_config(name, ratio)
    assert kept_share(mixed) == pytest.approx(kept_share(uniform), rel=0.01)
    assert (rank_layout(uniform), rank_layout(mixed), rank_layout(uniform.dense())) == ("uniform", "mixed", "dense")
    shares = [
        rank / uniform.factorization.rank_by_site[site] for site, rank in mixed.factorization.rank_by_site.items()
    ]
    assert len(shares) == len(uniform.factorization.ranks)
    assert min(shares) < 0.75 and max(shares) > 1.25 and max(shares) / min(shares) < 1.1 / 0.3 * 1.1


def test_mixed_ranks_depend_on_the_seed_alone() -> None:
    assert mixed_config("tiny", 0.5) == mixed_config("tiny", 0.5, seed=0) != mixed_config("tiny", 0.5, seed=1)
    ranks = mixed_config("llama-2-7b", 0.5).factorization.rank_by_site
    assert (ranks["layers_0.self_attn.q_proj"], ranks["layers_31.mlp.down_proj"]) == (1172, 752)


@pytest.mark.parametrize("name", SHAPES)
def test_dense_sites_among_low_rank_ones_hold_what_uniform_ranks_hold(name: str) -> None:
    found = partly_dense_config(name, 0.5)
    assert kept_share(found) == pytest.approx(kept_share(shape_config(name, 0.5)), rel=0.01)
    sites = layer_sites(found)
    dense = [site.name for site in sites if site.name not in found.factorization.rank_by_site]
    assert rank_layout(found) == "partly dense" and len(dense) == len(sites) // 8
    assert found == partly_dense_config(name, 0.5, seed=0) != partly_dense_config(name, 0.5, seed=1)
    for ratio in (0.05, 1.0):
        with pytest.raises(RequestError, match="needs a ratio below 1 that holds them"):
            partly_dense_config(name, ratio)


def test_unknown_shapes_and_ratios_are_refused() -> None:
    with pytest.raises(RequestError, match="no shape named 'huge'; known: llama-2-7b"):
        shape_config("huge")
    for ratio in (0.0, 1.5):
        with pytest.raises(RequestError, match="ratio must be above 0 and at most 1"):
            shape_config("tiny", ratio)
    with pytest.raises(RequestError, match="mixed ranks needs a ratio below 1"):
        mixed_config("tiny", 1.0)


def test_rows_are_the_same_in_every_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    command = [
        "bench",
        "--shape",
        "tiny",
        "--dtype",
        "float32",
        "-p",
        "16",
        "-n",
        "8",
        "-r",
        "1",
        "--kernels",
        "xla",
        "--append",
        str(file),
    ]
    for form in ("jsonl", "csv", "md"):
        assert main([*command, "-o", form]) == 0
        printed = capsys.readouterr().out
        rows = [json.loads(line) for line in file.read_text().splitlines()][-2:]
        match form:
            case "jsonl":
                assert [json.loads(line) for line in printed.splitlines()] == rows
            case "csv":
                assert list(csv.DictReader(io.StringIO(printed)))[1]["test"] == rows[1]["test"]
            case "md":
                assert len(printed.splitlines()) == 4 and f"{rows[1]['ms_per_token']:.3f}" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give either a model or --shape"),
        (["--shape", "tiny", "-r", "0"], "--new and --repeats must be at least 1"),
        (["--shape", "tiny", "--ratio", "half"], "--ratio 'half' is not a list of numbers"),
    ],
)
def test_wrong_calls_are_explained(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *options]) == 1
    assert message in capsys.readouterr().err
