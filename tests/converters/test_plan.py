"""Where parameters come from, worked out from names and shapes alone; no file and no tensor is needed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters import FAMILIES
from converters.naming import torch_name
from converters.plan import Plan, make_plan
from converters.sources import TensorInfo
from flashsvd_jax.config import ModelConfig
from flashsvd_jax.errors import ConversionError
from flashsvd_jax.schema import schema, sites

HF: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 44,
    "intermediate_size": 58,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "num_hidden_layers": 2,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
}
QWEN = HF | {"model_type": "qwen2"}
TIED = HF | {"tie_word_embeddings": True}
SQUARE = HF | {"num_key_value_heads": 4, "head_dim": 10, "hidden_size": 40}
FAMILY = {family.name: family for family in FAMILIES}
LAYER0 = "model.layers.0.self_attn"


class Checkpoint:
    """Names and shapes of a checkpoint: dense at first, and changed by the tests."""

    def __init__(self, hf: Mapping[str, Any] = HF):
        self.config = ModelConfig.from_hf(hf)
        self.shapes = {torch_name(name): spec.shape for name, spec in schema(self.config).items()}
        self.identities: dict[str, object] = {}
        self.dtypes: dict[str, Any] = {}
        self.by_module = {torch_name(site.name): site for site in sites(self.config)}

    def factorize(self, module: str, rank: int, down: str = "{}.BLinear.weight", up: str = "{}.ALinear.weight") -> None:
        site = self.by_module[module]
        del self.shapes[f"{module}.weight"]
        self.shapes |= {down.format(module): (rank, site.d_in), up.format(module): (site.d_out, rank)}
        if self.shapes.pop(f"{module}.bias", None):
            self.shapes[up.format(module).replace(".weight", ".bias")] = (site.d_out,)

    def plan(self, family: str = "asvd", rank_map: object = None) -> Plan:
        infos = {
            name: TensorInfo(
                name, shape, np.dtype(self.dtypes.get(name, np.float16)), Path("x"), self.identities.get(name, name)
            )
            for name, shape in self.shapes.items()
        }
        return make_plan(self.config, infos, FAMILY[family], rank_map, "somewhere/model")

    def problems(self, family: str = "asvd", rank_map: object = None) -> list[str]:
        with pytest.raises(ConversionError) as caught:
            self.plan(family, rank_map)
        first, *lines = str(caught.value).splitlines()
        assert first.startswith("somewhere/model") and FAMILY[family].description in first
        assert f"{len(lines)} problem" in first
        return [line.strip() for line in lines]


def sources(plan: Plan, site: str) -> dict[str, str]:
    return {name.rpartition(".")[2]: t.name for name, t in plan.tensors.items() if name.startswith(f"{site}.")}


def test_dense_checkpoint() -> None:
    plan = Checkpoint().plan("dense")
    assert not plan.config.factorization
    assert set(plan.tensors) == set(schema(plan.config))
    assert plan.tensors["layers_1.input_layernorm.scale"].name == "model.layers.1.input_layernorm.weight"
    assert plan.tensors["lm_head.weight"].name == "lm_head.weight"


def test_mixture_of_dense_and_low_rank_sites_a_factorized_head_and_biases() -> None:
    checkpoint = Checkpoint(QWEN)
    checkpoint.factorize(f"{LAYER0}.q_proj", 7)
    checkpoint.factorize("lm_head", 9)
    plan = checkpoint.plan()
    assert plan.config.factorization.rank_by_site == {"layers_0.self_attn.q_proj": 7, "lm_head": 9}
    assert sources(plan, "layers_0.self_attn.q_proj") == {
        "down": f"{LAYER0}.q_proj.BLinear.weight",
        "up": f"{LAYER0}.q_proj.ALinear.weight",
        "bias": f"{LAYER0}.q_proj.ALinear.bias",
    }
    assert sources(plan, "layers_0.self_attn.k_proj") == {
        "weight": f"{LAYER0}.k_proj.weight",
        "bias": f"{LAYER0}.k_proj.bias",
    }
    assert plan.dropped == () and plan.equal == () and plan.notes == ()


def test_every_tensor_is_used_once_or_dropped() -> None:
    checkpoint = Checkpoint()
    checkpoint.factorize(f"{LAYER0}.o_proj", 7)
    checkpoint.shapes[f"{LAYER0}.rotary_emb.inv_freq"] = (6,)
    plan = checkpoint.plan()
    used = [info.name for info in plan.tensors.values()] + list(plan.dropped)
    assert sorted(used) == sorted(checkpoint.shapes)
    assert plan.dropped == (f"{LAYER0}.rotary_emb.inv_freq",)


def test_all_problems_are_listed_at_once() -> None:
    checkpoint = Checkpoint()
    checkpoint.factorize(f"{LAYER0}.q_proj", 7)
    checkpoint.factorize(f"{LAYER0}.k_proj", 8)
    del checkpoint.shapes[f"{LAYER0}.q_proj.ALinear.weight"]
    checkpoint.shapes[f"{LAYER0}.k_proj.ALinear.weight"] = (24, 9)
    del checkpoint.shapes["model.norm.weight"]
    checkpoint.shapes["model.layers.1.mlp.up_proj.weight"] = (44, 58)
    checkpoint.shapes["model.layers.2.mlp.up_proj.weight"] = (58, 44)
    checkpoint.dtypes["lm_head.weight"] = np.int8
    problems = checkpoint.problems()
    assert sorted(problem.partition(":")[0] for problem in problems) == [
        "mis-shaped", "mis-shaped", "missing", "missing", "not floating point", "unexpected",
    ]  # fmt: skip
    text = "\n".join(problems)
    assert f"missing: {LAYER0}.q_proj.ALinear.weight, the other factor is there" in text
    assert f"{LAYER0}.k_proj.BLinear.weight [8, 44] and {LAYER0}.k_proj.ALinear.weight [24, 9] do not form" in text
    assert "missing: model.norm.weight [44]" in text
    assert "model.layers.1.mlp.up_proj.weight is [44, 58], the base model makes it [58, 44]" in text
    assert "unexpected: model.layers.2.mlp.up_proj.weight [58, 44]" in text
    assert "not floating point: lm_head.weight is int8" in text


def test_long_lists_of_problems_are_cut() -> None:
    checkpoint = Checkpoint()
    checkpoint.shapes |= {f"extra.{i}": (1,) for i in range(250)}
    with pytest.raises(ConversionError) as caught:
        checkpoint.plan("dense")
    assert "250 problems" in str(caught.value) and "and 150 more" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 102


def test_dense_weight_beside_factors_is_unexpected() -> None:
    checkpoint = Checkpoint()
    checkpoint.factorize(f"{LAYER0}.q_proj", 7)
    checkpoint.shapes[f"{LAYER0}.q_proj.weight"] = (48, 44)
    assert checkpoint.problems() == [f"unexpected: {LAYER0}.q_proj.weight [48, 44]"]


@pytest.mark.parametrize("family", ["asvd", "lowrankarena", "dobi"])
def test_names_of_tagged_families_bind(family: str) -> None:
    """ASVD's names with Dobi-SVD's shapes, and the other way round."""
    checkpoint = Checkpoint()
    names = {"down": "{}.ALinear.weight", "up": "{}.BLinear.weight"}
    if family == "dobi":
        names = {"down": names["up"], "up": names["down"]}
    checkpoint.factorize(f"{LAYER0}.q_proj", 7, **names)
    (problem,) = checkpoint.problems(family)
    assert problem.startswith("wrong way round: ") and f"{LAYER0}.q_proj.ALinear.weight" in problem
    assert FAMILY[family].description in problem


def test_svdllm_names_bind_where_the_configuration_tells_them_from_swift_svds() -> None:
    checkpoint = Checkpoint()
    checkpoint.factorize(f"{LAYER0}.q_proj", 7)
    shapes = checkpoint.shapes
    shapes[f"{LAYER0}.q_u_proj.weight"] = shapes.pop(f"{LAYER0}.q_proj.BLinear.weight")
    shapes[f"{LAYER0}.q_v_proj.weight"] = shapes.pop(f"{LAYER0}.q_proj.ALinear.weight")
    assert checkpoint.problems("svdllm_hf")[0].startswith("wrong way round: ")
    assert checkpoint.plan("svdllm").notes == (
        "u_proj is applied before v_proj at 1 of 1 sites, as only that fits their shapes",
    )


@pytest.mark.parametrize(
    ("family", "down", "up"),
    [
        ("bare_ab", "BLinear", "ALinear"),
        ("bare_ab", "ALinear", "BLinear"),
        ("aa_svd", "V", "U"),
        ("aa_svd", "U", "V"),
        ("zs_svd", "v_proj", "u_proj"),
        ("zs_svd", "u_proj", "v_proj"),
        ("sequential", "0", "1"),
        ("fwsvd", "lin0", "lin1"),
        ("dynrank", "first", "second"),
        ("lems", "mod_a", "mod_b"),
    ],
)
def test_shapes_decide_for_families_without_a_tag(family: str, down: str, up: str) -> None:
    checkpoint = Checkpoint(QWEN)
    module = f"{LAYER0}.v_proj"
    checkpoint.factorize(module, 7, f"{{}}.{down}.weight", f"{{}}.{up}.weight")
    plan = checkpoint.plan(family)
    assert sources(plan, "layers_0.self_attn.v_proj") == {
        "down": f"{module}.{down}.weight",
        "up": f"{module}.{up}.weight",
        "bias": f"{module}.{up}.bias",
    }
    named = FAMILY[family].pairs[0].first.endswith(f".{down}.weight")
    assert plan.notes == (
        () if named else (f"{down} is applied before {up} at 1 of 1 sites, as only that fits their shapes",)
    )


def test_square_factors_of_a_tagged_family_go_by_their_names() -> None:
    checkpoint = Checkpoint(SQUARE)
    checkpoint.factorize(f"{LAYER0}.q_proj", 40)
    assert sources(checkpoint.plan("asvd"), "layers_0.self_attn.q_proj")["down"].endswith("BLinear.weight")
    assert sources(checkpoint.plan("dobi"), "layers_0.self_attn.q_proj")["down"].endswith("ALinear.weight")


@pytest.mark.parametrize(("family", "names", "swapped"), [("bare_ab", "BA", "AB"), ("aa_svd", "VU", "UV")])
def test_square_factors_follow_the_other_pairs(family: str, names: str, swapped: str) -> None:
    suffix = "Linear.weight" if family == "bare_ab" else ".weight"
    for order in (names, swapped):
        checkpoint = Checkpoint(SQUARE)
        down, up = (f"{{}}.{name}{suffix}" for name in order)
        checkpoint.factorize(f"{LAYER0}.q_proj", 40, down, up)
        checkpoint.factorize(f"{LAYER0}.k_proj", 5, down, up)
        found = sources(checkpoint.plan(family), "layers_0.self_attn.q_proj")
        assert found["down"] == down.format(f"{LAYER0}.q_proj")


def test_a_square_pair_the_other_way_round_than_others_may_be_transposed() -> None:
    checkpoint = Checkpoint(SQUARE)
    checkpoint.factorize(f"{LAYER0}.k_proj", 5, "{}.V.weight", "{}.U.weight")
    checkpoint.factorize(f"{LAYER0}.q_proj", 6, "{}.U.weight", "{}.V.weight")
    (problem,) = checkpoint.problems("aa_svd")
    assert problem.startswith(f"ambiguous: {LAYER0}.q_proj.V.weight") and "unlike 1 other pairs" in problem


def test_square_factors_alone_are_ambiguous_only_without_meaningful_names() -> None:
    checkpoint = Checkpoint(SQUARE)
    checkpoint.factorize(f"{LAYER0}.q_proj", 40)
    (problem,) = checkpoint.problems("bare_ab")
    assert problem.startswith("ambiguous: ")
    checkpoint = Checkpoint(SQUARE)
    checkpoint.factorize(f"{LAYER0}.q_proj", 40, "{}.V.weight", "{}.U.weight")
    assert sources(checkpoint.plan("aa_svd"), "layers_0.self_attn.q_proj")["down"].endswith(".V.weight")


def test_bias_on_the_first_factor_is_refused() -> None:
    checkpoint = Checkpoint(QWEN)
    module = f"{LAYER0}.q_proj"
    checkpoint.factorize(module, 7, "{}.ALinear.weight", "{}.BLinear.weight")
    checkpoint.shapes[f"{module}.ALinear.bias"] = checkpoint.shapes.pop(f"{module}.BLinear.bias")
    problems = checkpoint.problems("dobi")
    assert f"bias on the first factor: {module}.ALinear.bias [48]; only output biases are read" in problems
    assert f"missing: {module}.BLinear.bias [48]" in problems


def test_bias_that_the_base_model_lacks_is_unexpected() -> None:
    checkpoint = Checkpoint()
    checkpoint.factorize(f"{LAYER0}.q_proj", 7)
    checkpoint.shapes[f"{LAYER0}.q_proj.ALinear.bias"] = (48,)
    assert checkpoint.problems() == [f"unexpected: {LAYER0}.q_proj.ALinear.bias [48]"]


@pytest.mark.parametrize("place", ["{}.ALinear.bias", "{}.bias", "model.layers.0.self_attn.q_bias"])
def test_places_of_a_bias(place: str) -> None:
    checkpoint = Checkpoint(QWEN)
    module = f"{LAYER0}.q_proj"
    checkpoint.factorize(module, 7)
    name = place.format(module)
    checkpoint.shapes[name] = checkpoint.shapes.pop(f"{module}.ALinear.bias")
    assert sources(checkpoint.plan(), "layers_0.self_attn.q_proj")["bias"] == name
    checkpoint.shapes["model.layers.0.self_attn.q_bias"] = checkpoint.shapes[f"{module}.bias"] = (48,)
    assert all(problem.startswith("unexpected: ") for problem in checkpoint.problems())


RANKS = {f"{LAYER0}.q_proj": 7, "lm_head": 9}


@pytest.mark.parametrize(
    "rank_map",
    [
        RANKS,
        {module: {"rank": rank} for module, rank in RANKS.items()},
        {module.removeprefix("model."): rank for module, rank in RANKS.items()},
        {f"wrapped_model.{module}": rank for module, rank in RANKS.items()},
        {},
        None,
    ],
)
def test_rank_maps_that_agree(rank_map: object) -> None:
    checkpoint = Checkpoint()
    for module, rank in RANKS.items():
        checkpoint.factorize(module, rank)
    assert checkpoint.plan(rank_map=rank_map).config.factorization.rank("lm_head") == 9


@pytest.mark.parametrize(
    ("rank_map", "problems"),
    [
        (RANKS | {"lm_head": 8}, ["truncation_ranks says rank 8 for lm_head, the tensors say rank 9"]),
        ({"lm_head": 9}, [f"truncation_ranks says dense for {LAYER0}.q_proj, the tensors say rank 7"]),
        (
            {"lm_head": 1, f"{LAYER0}.q_proj": 2},
            [
                f"truncation_ranks says rank 2 for {LAYER0}.q_proj, the tensors say rank 7",
                "truncation_ranks says rank 1 for lm_head, the tensors say rank 9",
            ],
        ),
        (RANKS | {f"{LAYER0}.k_proj": 5}, [f"truncation_ranks says rank 5 for {LAYER0}.k_proj, the tensors say dense"]),
        (
            RANKS | {"model.layers.2.mlp.up_proj": 5},
            ["truncation_ranks names model.layers.2.mlp.up_proj, which the base"],
        ),
        ([7, 9], ["truncation_ranks in config.json does not map module names to ranks"]),
        (RANKS | {"lm_head": "9"}, ["truncation_ranks in config.json does not map module names to ranks"]),
    ],
)
def test_rank_maps_that_disagree(rank_map: object, problems: list[str]) -> None:
    checkpoint = Checkpoint()
    for module, rank in RANKS.items():
        checkpoint.factorize(module, rank)
    found = checkpoint.problems(rank_map=rank_map)
    assert len(found) == len(problems)
    for problem, words in zip(found, problems, strict=True):
        assert problem.startswith(f"rank map: {words}")


def test_tied_head_is_dropped_when_it_is_the_embedding_and_compared_when_it_may_be() -> None:
    checkpoint = Checkpoint(TIED)
    assert checkpoint.plan("dense").dropped == ()
    checkpoint.shapes["lm_head.weight"] = (97, 44)
    plan = checkpoint.plan("dense")
    assert plan.dropped == ("lm_head.weight",)
    assert plan.equal == (("lm_head.weight", "model.embed_tokens.weight"),)
    checkpoint.identities = dict.fromkeys(("lm_head.weight", "model.embed_tokens.weight"), "one storage")
    plan = checkpoint.plan("dense")
    assert plan.dropped == ("lm_head.weight",) and plan.equal == ()
    assert not plan.config.factorization.shared


def test_heads_that_do_not_fit_the_configuration_are_explained() -> None:
    checkpoint = Checkpoint(TIED)
    checkpoint.shapes |= {"lm_head.BLinear.weight": (9, 44), "lm_head.ALinear.weight": (97, 9)}
    assert all("ties the head to the embedding" in problem for problem in checkpoint.problems())
    checkpoint = Checkpoint(TIED)
    checkpoint.shapes["lm_head.weight"] = (98, 44)
    (problem,) = checkpoint.problems("dense")
    assert problem.startswith("unexpected: lm_head.weight [98, 44]; the base configuration ties the head to")
    checkpoint = Checkpoint()
    del checkpoint.shapes["lm_head.weight"]
    (problem,) = checkpoint.problems("dense")
    assert problem == "missing: lm_head.weight [97, 44]; the base configuration does not tie it to the embedding"


def test_tensors_of_one_storage_are_stored_once() -> None:
    checkpoint = Checkpoint()
    for stem in "qkv":
        checkpoint.factorize(f"{LAYER0}.{stem}_proj", 7)
        checkpoint.identities[f"{LAYER0}.{stem}_proj.BLinear.weight"] = "joint"
    plan = checkpoint.plan("bare_ab")
    assert plan.config.factorization.owner_by_name == {
        "layers_0.self_attn.k_proj.down": "layers_0.self_attn.q_proj.down",
        "layers_0.self_attn.v_proj.down": "layers_0.self_attn.q_proj.down",
    }
    assert plan.tensors.keys() - plan.stored.keys() == plan.config.factorization.owner_by_name.keys()
    assert len(plan.stored) == len(checkpoint.shapes) - 2


def test_two_names_for_one_parameter_are_a_problem() -> None:
    checkpoint = Checkpoint()
    checkpoint.shapes |= {f"wrapped_model.{name}": shape for name, shape in checkpoint.shapes.items()}
    assert len(checkpoint.problems("lems")) == len(checkpoint.shapes) // 2
