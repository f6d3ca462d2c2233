"""Targets other than a ratio: what ranks cost is what a step of such a model reads, and what the table of costs makes of it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from flashsvd_jax.cli import main
from flashsvd_jax.compress import Recipe, Target
from flashsvd_jax.compress.budget import CONTEXT, budget_of, decode_milliseconds
from flashsvd_jax.compress.decode_costs import DecodeCosts, load_costs
from flashsvd_jax.compress.ranks import Measures, choose_ranks
from flashsvd_jax.config import ModelConfig
from flashsvd_jax.errors import RequestError
from flashsvd_jax.factorization import Factorization
from flashsvd_jax.inspection import inspect
from flashsvd_jax.kv_cache import cache_bytes
from flashsvd_jax.random_weights import random_weights
from flashsvd_jax.schema import count_params
from flashsvd_jax.shapes import layer_sites, shape_config
from pallas_kernels import hardware_rank

COSTS = DecodeCosts("some/kernels", 1e-3, 3.0, 0.5, 40.0)
DENSE = shape_config("tiny")
GROUPS = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]


def gains() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    sizes = ((site.name, min(site.d_out, site.d_in)) for site in layer_sites(DENSE))
    return {name: np.sort(rng.uniform(size=size) ** 6)[::-1] for name, size in sizes}


def chosen(target: Target, alloc: str = "greedy") -> ModelConfig:
    ranks = choose_ranks(Recipe("svd", target, alloc), DENSE, 2, Measures(gains))
    return dataclasses.replace(DENSE, factorization=Factorization.of(ranks))


def read(config: ModelConfig, context: int = 0) -> int:
    weights = jax.eval_shape(lambda: random_weights(config))
    return sum(2 * array.size for array in weights.read_by_a_step()) + cache_bytes(config, 1, context, 2)


def milliseconds(config: ModelConfig, costs: DecodeCosts) -> float:
    """By the definition; a packed group's launches are shared out evenly among its sites."""
    ranks, products = config.factorization.rank_by_site, 1.0
    for site in layer_sites(config):
        group = next(group for group in GROUPS if site.name.endswith(group))
        products += (2 if site.name in ranks else 1) / len(group)
    layers = [
        {n.split(".", 1)[1]: r for n, r in ranks.items() if n.startswith(f"layers_{i}.")}
        for i in range(config.num_layers)
    ]
    a_layer = costs.us_a_layer + costs.us_a_differing_layer * any(layer != layers[0] for layer in layers)
    microseconds = products * costs.us_a_product + config.num_layers * a_layer
    return read(config, CONTEXT) / costs.read_tb_s / 1e9 + microseconds / 1e3


@pytest.mark.parametrize("alloc", ["uniform", "greedy", "v2"])
def test_a_target_in_parameters_is_met(alloc: str) -> None:
    dense = count_params(DENSE)
    assert 0.78 * dense < count_params(chosen(Target("params", 0.8 * dense), alloc)) <= 0.8 * dense


@pytest.mark.parametrize("alloc", ["uniform", "greedy", "v2"])
def test_a_target_in_bytes_is_met_with_ranks_that_kernels_do_not_pad(alloc: str) -> None:
    found = chosen(Target("bytes", 0.7 * read(DENSE)), alloc)
    assert 0.6 * read(DENSE) < read(found) <= 0.7 * read(DENSE)
    assert all(hardware_rank(rank) == rank for rank in found.factorization.rank_by_site.values())


@pytest.mark.parametrize("alloc", ["uniform", "greedy", "v2"])
def test_a_target_in_milliseconds_is_met(alloc: str) -> None:
    most = 0.8 * milliseconds(DENSE, COSTS)
    found = chosen(Target("ms", most, COSTS), alloc)
    ranks = found.factorization.rank_by_site
    assert 0.88 * most < milliseconds(found, COSTS) <= most * (1 + 1e-9)
    assert all(hardware_rank(rank) == rank for rank in ranks.values())
    assert len(ranks) == len(layer_sites(DENSE)) or alloc == "greedy"
    for config in (found, DENSE):
        assert decode_milliseconds(config, 2, COSTS) == pytest.approx(milliseconds(config, COSTS))


def test_ranks_cost_what_they_are_padded_to_and_no_more_than_the_weight() -> None:
    budget, site = budget_of(Target("bytes", 0.7 * read(DENSE)), DENSE, 2), layer_sites(DENSE)[0]
    assert (site.d_out, site.d_in) == (256, 256)
    assert budget.cost(site, 33) == budget.cost(site, 48) == 2 * 48 * 512
    assert budget.cost(site, 250) == budget.cost(site, None) == 2 * 256 * 256
    assert budget.ranks(site) == [16, 32, 48, 64, 80, 96, 112, 128]
    assert [budget.rounded(rank) for rank in (127, 60, 9)] == [112, 48, 9]


def test_products_that_cost_time_leave_sites_dense_for_which_bytes_would_not() -> None:
    many = dataclasses.replace(COSTS, us_a_product=60.0)
    by_bytes = chosen(Target("ms", 0.8 * milliseconds(DENSE, COSTS), COSTS))
    by_time = chosen(Target("ms", 0.95 * milliseconds(DENSE, many), many))
    assert len(by_time.factorization.ranks) < len(by_bytes.factorization.ranks)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Target("params", 100), "100 parameters do not suffice for what stays dense"),
        (Target("params", 10**9), "the dense model does not exceed 1,000,000,000 parameters"),
        (Target("bytes", 10**10), "the dense model does not exceed 10,000,000,000 bytes of weights a token"),
        (Target("ms", 1e-3, COSTS), "0.001 ms a token by the costs of some/kernels do not suffice"),
    ],
)
def test_targets_that_cannot_be(target: Target, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        budget_of(target, DENSE, 2)


def test_a_target_just_above_what_stays_dense_is_an_error() -> None:
    rest = count_params(DENSE) - sum(site.d_out * site.d_in for site in layer_sites(DENSE))
    for alloc in ("uniform", "greedy", "v2"):
        with pytest.raises(RequestError, match="does not suffice for the lowest ranks everywhere"):
            chosen(Target("params", rest + 1000), alloc)


@pytest.mark.parametrize("unit", ["params", "bytes", "ms"])
def test_amounts_and_costs_are_checked(unit: Any) -> None:
    for amount in (0, -1, float("nan"), float("inf")):
        with pytest.raises(RequestError, match="must be above 0"):
            Target(unit, amount, COSTS if unit == "ms" else None)
    with pytest.raises(RequestError, match="needs a table of what decoding costs"):
        Target(unit, 5.0, None if unit == "ms" else COSTS)


def test_tables_of_costs_are_read_and_checked(tmp_path: Path) -> None:
    assert load_costs() != load_costs("nvidia_h200/products")
    file = tmp_path / "costs.json"
    fields = {"read_tb_s": 1.5, "us_a_layer": 2, "us_a_product": 0, "us_a_differing_layer": 1}
    file.write_text(json.dumps({"mine": fields}))
    assert load_costs("mine", file) == DecodeCosts("mine", 1.5, 2, 0, 1)
    with pytest.raises(RequestError, match="has no costs of 'other'; it has mine"):
        load_costs("other", file)
    for wrong in ({"read_tb_s": 0}, {"us_a_layer": -1}, {"us_a_product": "1"}, {"us_a_differing_layer": None}):
        file.write_text(json.dumps({"mine": fields | wrong}))
        with pytest.raises(RequestError, match="read_tb_s above 0"):
            load_costs("mine", file)
    file.write_text("nothing")
    with pytest.raises(RequestError, match="cannot be read as a table of costs"):
        load_costs("mine", file)


def test_targets_on_the_command_line(dense: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin = ["compress", str(dense.folder)]
    end = ["--method", "svd", "--quiet"]
    params = inspect(dense.folder).params
    assert main([*begin, str(tmp_path / "a"), "--params", str(params - 9000), "--alloc", "greedy", *end]) == 0
    assert params - 9400 < inspect(tmp_path / "a").params <= params - 9000
    read = inspect(dense.folder, context=1)
    least = read.bytes_per_step - read.cache_bytes - 9000
    assert main([*begin, str(tmp_path / "b"), "--bytes-per-token", str(least), *end]) == 0
    costs = tmp_path / "costs.json"
    costs.write_text(
        json.dumps({"mine": {"read_tb_s": 1e-3, "us_a_layer": 0, "us_a_product": 0, "us_a_differing_layer": 0}})
    )
    time = ["--ms-per-token", "60", "--costs", "mine", "--costs-file", str(costs)]
    assert main([*begin, str(tmp_path / "c"), *time, *end]) == 1
    assert "does not exceed 60 ms a token by the costs of mine" in capsys.readouterr().err
    manifest = tmp_path / "a" / "factorization.json"
    assert main([*begin, str(tmp_path / "d"), "--ranks", str(manifest), *end]) == 0
    ranks = [{site.name: site.rank for site in inspect(tmp_path / name).sites} for name in "ad"]
    assert ranks[0] == ranks[1]
    assert "with given ranks" in inspect(tmp_path / "d").notes[0]
    assert main([*begin, str(tmp_path / "e"), "--ranks", str(manifest), "--alloc", "greedy", *end]) == 1
    assert main([*begin, str(tmp_path / "e"), "--ratio", "0.5", "--costs", "mine", *end]) == 1
    assert "--costs-file are for --ms-per-token" in capsys.readouterr().err
