"""What `inspect` says against the schema, the files, and the model as it is really loaded."""

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import hf_models
import jax
import numpy as np
import pytest

import flashsvd_jax
from flashsvd_jax.any_config import config_from_hf
from flashsvd_jax.benchmark import bytes_per_token
from flashsvd_jax.checkpoint import Manifest, ModelFolder, open_folder, save_params
from flashsvd_jax.checkpoint.shards import Shards
from flashsvd_jax.errors import CheckpointError, MissingExtraError, ModelNotFoundError, RequestError
from flashsvd_jax.factorization import MATERIALIZE, Factorization
from flashsvd_jax.inspection import inspect
from flashsvd_jax.inspection_result import Inspection
from flashsvd_jax.kv_cache import empty_cache
from flashsvd_jax.models import absorption
from flashsvd_jax.models.expansion import expanded_sites
from flashsvd_jax.models.weights import DecoderWeights, build_weights
from flashsvd_jax.plotting import plot_ranks
from flashsvd_jax.schema import count_params, nest, schema
from pallas_kernels import assume_target, hardware_rank
from pallas_kernels.target import H200


@pytest.fixture(scope="module")
def found(tiny: Any) -> Inspection:
    return inspect(tiny.folder)


def write_zeros(folder: Path, hf_config: dict[str, Any], factorization: Factorization) -> Path:
    config = config_from_hf(hf_config, factorization)
    manifest = Manifest(
        family="basis_sharing",
        dtype="bfloat16",
        factorization=factorization,
        params=count_params(config),
        params_dense=count_params(config.dense()),
    )
    params = nest({name: np.zeros(spec.shape, np.float32) for name, spec in schema(config).items()})
    save_params(folder, params, config, hf_config, manifest)
    return folder


@pytest.fixture(scope="module")
def sharing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five layers. The first factor of q, k and v is one in the first four, within a layer and across."""
    hf_config = hf_models.build_model("llama", num_hidden_layers=5, tie_word_embeddings=True).config.to_dict()
    ranks = {f"layers_{i}.self_attn.{p}_proj": 20 for i in range(4) for p in "qkv"}
    owner, *others = [f"{site}.down" for site in ranks]
    ranks |= {f"layers_{i}.mlp.down_proj": 33 for i in range(4)}
    folder = tmp_path_factory.mktemp("models") / "sharing"
    return write_zeros(folder, hf_config, Factorization.of(ranks, dict.fromkeys(others, owner)))


def test_every_site_is_listed_with_its_rank_and_shape(tiny: Any, found: Inspection) -> None:
    config = tiny.model.config
    assert len(found.sites) == 7 * config.num_layers + 1
    flat = hf_models.canonical_tensors(tiny.reference.model)
    for site in found.sites:
        held = [flat[f"{site.name}.{part}"] for part in ("weight", "down", "up") if f"{site.name}.{part}" in flat]
        assert (site.d_out, site.d_in) == (held[-1].shape[0], held[0].shape[1])
        assert site.rank == (None if len(held) == 1 else held[0].shape[0])
        assert site.kept == pytest.approx(sum(array.size for array in held) / (site.d_out * site.d_in))
        assert site.borrowed == ()


def test_totals_are_those_of_the_files(tiny: Any, found: Inspection) -> None:
    assert found.params == sum(array.size for array in hf_models.canonical_tensors(tiny.reference.model).values())
    assert found.params_dense > 0
    assert found.disk_bytes == (tiny.folder / "model.safetensors").stat().st_size > 4 * found.params
    assert (found.family, found.base_model, found.dtype) == ("svdllm", "owner/base", "float32")
    assert (found.batch, found.context) == (1, 128)


def device_bytes(weights: DecoderWeights) -> int:
    """Memory of arrays, those that are in several places counted once."""
    return sum({id(array): array.nbytes for array in jax.tree.leaves(weights)}.values())


@pytest.mark.parametrize("materialize", MATERIALIZE)
def test_memory_is_that_of_the_model_as_loaded(tiny: Any, materialize: str) -> None:
    found = inspect(tiny.folder, context=100, batch=3, materialize=materialize)
    weights = flashsvd_jax.load(tiny.folder, materialize=materialize).weights
    assert found.weight_bytes == device_bytes(weights)
    assert found.bytes_per_step == bytes_per_token(tiny.model.config, weights, 3, 100)
    assert (found.bytes_per_step == found.dense_bytes_per_step) == (materialize == "always")
    cache = empty_cache(tiny.model.config, 3, 100, np.dtype("float32"))
    assert found.cache_bytes == sum(array.nbytes for array in jax.tree.leaves(cache))


def test_expanding_saves_what_is_said(tiny: Any) -> None:
    stored, expanded = inspect(tiny.folder, materialize="never"), inspect(tiny.folder)
    assert expanded.expansions and not stored.expansions
    saved = sum(expansion.factor_bytes - expansion.dense_bytes for expansion in expanded.expansions)
    assert stored.weight_bytes - expanded.weight_bytes == stored.bytes_per_step - expanded.bytes_per_step == saved > 0
    assert expanded.bytes_per_step <= expanded.dense_bytes_per_step == stored.dense_bytes_per_step
    names = {name for expansion in expanded.expansions for name in expansion.sites}
    assert names == {site.name for site in expanded.sites if site.expanded}
    assert inspect(tiny.folder).materialize == "auto"


@pytest.mark.parametrize("materialize", MATERIALIZE)
def test_shared_arrays_are_held_once_and_read_where_they_are_used(sharing: Path, materialize: str) -> None:
    found = inspect(sharing, materialize=materialize)
    with open_folder(sharing) as folder:
        config = folder.config
        expand = expanded_sites(config, materialize, hardware_rank)
        weights = build_weights(config, folder.get, hardware_rank, jax.numpy.asarray, expand)
    assert found.weight_bytes == device_bytes(weights)
    assert found.bytes_per_step == bytes_per_token(config, weights, 1, found.context)
    assert found.params < sum(array.size for array in jax.tree.leaves(weights))
    assert found.site("layers_0.self_attn.q_proj").borrowed == ()
    assert found.site("layers_0.self_attn.k_proj").borrowed == ("down",)
    assert found.site("layers_3.self_attn.q_proj").borrowed == ("down",)


def test_no_weight_is_read(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(ModelFolder, "get", refuse)
    monkeypatch.setattr(Shards, "read", refuse)
    str(inspect(tiny.folder))


def test_table_joins_equal_layers_and_marks_what_is_unusual(sharing: Path) -> None:
    lines = str(inspect(sharing)).splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("layers"))
    assert lines[header].split() == ["layers", "q", "k", "v", "o", "gate", "up", "down"]
    assert lines[header + 1].split() == ["48x48", "16x48", "16x48", "48x48", "52x48", "52x48", "48x52"]
    first, middle, last = (re.split(r" {2,}", line) for line in lines[header + 2 : header + 5])
    kept = f"{33 * (48 + 52) / (48 * 52):.0%}"
    assert first == ["0", "20 83%", "20 167%!=", "20 167%!=", "dense", "dense", "dense", f"33 {kept}!~"]
    assert middle == ["1-3", "20 83%=", "20 167%!=", "20 167%!=", "dense", "dense", "dense", f"33 {kept}!~"]
    assert last == ["4", *["dense"] * 7]
    legend = "\n".join(lines[header + 5 :])
    assert "! rank above break-even" in legend
    assert "= reads a factor" in legend
    assert "~ expanded to the dense weight at load, which holds less" in legend
    # Four layers in bfloat16, rank 33 padded to 48. The basis of q, k and v saves memory, so it stays.
    factors, dense = 4 * 2 * 48 * (48 + 52), 4 * 2 * 48 * 52
    assert f"  down: 4 sites, {dense / 1024:.2f} KiB in place of {factors / 1024:.2f} KiB" in legend.splitlines()
    assert "lm_head" not in legend


def test_sites_that_share_a_factor_have_one_line(sharing: Path) -> None:
    lines = str(inspect(sharing, materialize="always")).splitlines()
    assert "~ expanded to the dense weight at load, as asked:" in lines
    factors, dense = 2 * 32 * (48 + 4 * (48 + 16 + 16)), 4 * 2 * 48 * (48 + 16 + 16)
    assert f"  q, k, v: 12 sites, {dense / 1024:.2f} KiB in place of {factors / 1024:.2f} KiB" in lines


def test_legends_are_left_out_where_nothing_needs_them(tmp_path: Path) -> None:
    hf_config = hf_models.build_model("llama").config.to_dict()
    text = str(inspect(write_zeros(tmp_path / "model", hf_config, Factorization.of({"layers_0.mlp.up_proj": 4}))))
    assert "break-even" not in text
    assert "reads a factor" not in text
    assert "expanded" not in text
    assert "lm_head: dense, 71x48" in text


def test_text_gives_sizes_and_origin(found: Inspection) -> None:
    text = str(found)
    assert f"{found.params:,} stored" in text
    assert "svdllm of owner/base" in text
    assert "note: made by a test" in text
    assert "batch 1, context 128" in text


def test_json_holds_every_field(found: Inspection) -> None:
    held = json.loads(found.to_json())
    assert held["params"] == found.params
    assert held["sites"][0]["rank"] == found.sites[0].rank


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 0}, "context must be from 1 to 128"),
        ({"context": 129}, "context must be"),
        ({"batch": 0}, "batch must be"),
        ({"materialize": "some"}, "materialize 'some' is not one of auto, never, always"),
    ],
)
def test_sizes_that_the_model_cannot_have_are_refused(tiny: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        inspect(tiny.folder, **options)


def test_what_is_not_a_converted_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="convert it first"):
        inspect(tmp_path)
    with pytest.raises(ModelNotFoundError, match="no such file or folder"):
        inspect(tmp_path / "missing")


def test_heat_map_is_saved(found: Inspection, tmp_path: Path) -> None:
    plot_ranks(found, tmp_path / "ranks.png")
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")


def test_heat_map_of_a_dense_model(found: Inspection, tmp_path: Path) -> None:
    sites = tuple(dataclasses.replace(site, rank=None, kept=1.0) for site in found.sites)
    plot_ranks(dataclasses.replace(found, sites=sites), tmp_path / "ranks.png")


@pytest.mark.parametrize("name", ["missing/ranks.png", "ranks.nothing"])
def test_a_heat_map_that_cannot_be_written_is_refused(found: Inspection, tmp_path: Path, name: str) -> None:
    with pytest.raises(RequestError, match="cannot be written"):
        plot_ranks(found, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_plotting_names_the_extra_it_needs(found: Inspection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"flashsvd-jax\[plot\]"):
        plot_ranks(found, tmp_path / "ranks.png")


def test_it_says_how_a_step_is_computed_here(tmp_path: Path) -> None:
    hf = {
        "model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    folder = write_zeros(
        tmp_path / "model", hf, Factorization.of({"layers_0.mlp.down_proj": 16, "layers_1.mlp.down_proj": 24})
    )
    here = inspect(folder)
    assert (here.decode_kernel, here.decode_workspace) == ("products", None)
    assert "not persistent: written for Hopper" in str(here)
    with assume_target(H200):
        there, more = inspect(folder), inspect(folder, batch=9)
    assert there.decode_kernel == "persistent" and there.decode_refusals == {}
    assert 2**14 < (there.decode_workspace or 0) < 2**18 and "of memory for itself" in str(there)
    assert more.decode_kernel == "products" and "9 sequences" in more.decode_refusals["persistent"]


def test_what_the_engine_makes_of_the_weights_is_the_steps_own_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf = {
        "model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    low = ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")
    ranks = {f"layers_{layer}.{site}": 16 for layer in range(2) for site in low}
    folder = write_zeros(tmp_path / "model", hf, Factorization.of(ranks))
    with assume_target(H200):
        absorbed, several = inspect(folder), inspect(folder, batch=2)
        monkeypatch.setattr(absorption, "gains_by_absorbing", lambda layers, batch: False)
        plain = inspect(folder)
        assert inspect(folder, batch=2) == several
    assert absorbed.weight_bytes == plain.weight_bytes and absorbed.bytes_per_step == plain.bytes_per_step
    assert absorbed.decode_kernel == plain.decode_kernel == "persistent"
    assert (absorbed.decode_workspace or 0) >= (plain.decode_workspace or 0) + 2 * (2 * 16 * 16) * 2


def test_it_says_how_an_encoder_computes_here(tmp_path: Path) -> None:
    hf = {
        "model_type": "bert", "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
        "vocab_size": 96, "max_position_embeddings": 256,
    }  # fmt: skip
    names = [f"layers_0.self_attn.{n}_proj" for n in "qkv"]
    factors = Factorization.of(dict.fromkeys(names, 16), groups=dict.fromkeys(names, 4))
    folder = write_zeros(tmp_path / "model", hf, factors)
    assert set(inspect(folder).pass_kernels["attend_padded"]) == {"products"}
    with assume_target(H200):
        there = inspect(folder, batch=2)
    assert there.pass_kernels["attend_padded"] == {"stream": ()}
    (reasons,) = there.pass_kernels["feed_forward"].values()
    assert "attend_padded: stream; feed_forward: products, on this machine (batch 2, context 256)" in str(there)
    assert any("dense projection" in reason for reason in reasons) and "not by stream: a dense projection" in str(there)
