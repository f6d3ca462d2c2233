"""The table of families: what each is recognised by, in which order, and which are refused with which words."""

import json
import re

import pytest
from published_checkpoints import CASES, MODULES

from converters import FAMILIES, adapter_folder
from converters.detect import detect
from converters.families import WITHOUT_FORM
from converters.naming import is_buffer, torch_name
from converters.rules import PairRule, bias_names, read_shapes
from converters.sources import open_source
from flashsvd_jax.errors import ConversionError

Q = "model.layers.0.self_attn.q_proj"
V = "model.layers.31.self_attn.v_proj"


def found(names: list[str], config: dict | None = None) -> str:
    return detect(config or {}, names, "model").family.name


@pytest.mark.parametrize("case", CASES)
def test_published_checkpoints_are_recognised_with_evidence(case: str, published) -> None:
    checkpoint = published(case)
    if adapter_folder(checkpoint.path):
        pytest.skip("an adapter is told by its file, before anything is looked at")
    with open_source(checkpoint.path) as source:
        names = list(source.infos())
    beside = checkpoint.path / "config.json"
    detection = detect(json.loads(beside.read_text()) if beside.is_file() else {}, names, case)
    assert detection.family.name == checkpoint.family
    assert detection.evidence


@pytest.mark.parametrize(
    ("keys", "config", "family"),
    [
        (["ALinear", "BLinear"], {"low_rank_modules": {Q: 3}}, "lowrankarena"),
        (["ALinear", "BLinear"], {"model_type": "lowrank_qwen3"}, "lowrankarena"),
        (["ALinear", "BLinear"], {"architectures": ["LowRankLlamaForCausalLM"]}, "lowrankarena"),
        (["ALinear", "BLinear"], {"dobi_target_modules": {Q: 3}}, "dobi"),
        (["ALinear", "BLinear"], {"architectures": ["DobiSVDLlamaForCausalLM"]}, "dobi"),
        (["ALinear", "BLinear"], {"truncation_ranks": {Q: 3}}, "asvd"),
        (["ALinear", "BLinear"], {"architectures": ["ASVDLlamaForCausalLM"]}, "asvd"),
        (["ALinear", "BLinear"], {}, "bare_ab"),
        (["ALinear", "BLinear"], {"truncation_ranks": {}, "architectures": ["LlamaForCausalLM"]}, "bare_ab"),
        (["u_proj", "v_proj"], {"svd_ranks": {Q: 3}}, "svdllm_hf"),
        (["u_proj", "v_proj"], {"model_type": "svdllm-llama"}, "svdllm_hf"),
        (["u_proj", "v_proj"], {}, "zs_svd"),
        (["U", "V"], {}, "aa_svd"),
        (["0", "1"], {}, "sequential"),
        (["lin0", "lin1"], {}, "fwsvd"),
        (["first", "second"], {}, "dynrank"),
        (["mod_a", "mod_b"], {}, "lems"),
    ],
)
@pytest.mark.parametrize("module", [Q, V, "model.layers.7.mlp.down_proj", "lm_head"])
def test_names_of_a_pair_and_configuration_tell_the_family(
    module: str, keys: list[str], config: dict, family: str
) -> None:
    dense = [f"{other}.weight" for other in MODULES]
    assert found([*dense, *(f"{module}.{key}.weight" for key in keys)], config) == family


def test_svdllm_names_are_anchored_at_the_block() -> None:
    assert found(["model.layers.0.self_attn.v_u_proj.weight", "model.layers.0.self_attn.v_v_proj.weight"]) == "svdllm"
    assert found(["model.layers.0.mlp.gate_u_proj.weight"], {"model_type": "svdllm-llama"}) == "svdllm_hf"
    # ZS-SVD's factor of v_proj, and the plain weights of up_proj and v_proj, must not look like SVD-LLM's.
    assert found([f"{V}.v_proj.weight", f"{V}.u_proj.weight"]) == "zs_svd"
    assert found(["model.layers.0.self_attn.v_proj.weight", "model.layers.0.mlp.up_proj.weight"]) == "dense"


def test_names_outside_a_decoder_are_no_evidence() -> None:
    assert found(["vision.blocks.0.attn.q_proj.ALinear.weight", "x.U.weight", "model.layers.0.mlp.0.weight"]) == "dense"


@pytest.mark.parametrize("name", ["svd_layers.0.Pq", "bert.encoder.layer.11.block.U1", "encoder.layer.0.block.Uo"])
def test_blocks_of_flashsvd_are_told_by_their_factors(name: str) -> None:
    assert found(["bert.embeddings.word_embeddings.weight", name]) == "flashsvd_encoder"


def test_prefix_of_lems_is_looked_through() -> None:
    assert found([f"wrapped_model.{Q}.mod_a.weight", f"wrapped_model.{Q}.mod_b.weight"]) == "lems"


def test_merged_checkpoint_counts_as_dense_and_says_what_its_configuration_claims() -> None:
    detection = detect({"truncation_ranks": {Q: 3}}, [f"{Q}.weight"], "model")
    assert detection.family.name == "dense"
    assert "although config.json has truncation_ranks" in detection.evidence


REFUSED_NAMES = {
    "quantized": f"{Q}.qweight",
    "mla": "model.layers.0.self_attn.kv_a_proj_with_mqa.weight",
    "lora_whole": f"base_model.model.{Q}.lora_A.default.weight",
}


def test_every_refused_family_is_tested() -> None:
    refused = {family.name for family in FAMILIES if family.refusal}
    assert refused == REFUSED_NAMES.keys()


def test_every_family_that_is_read_has_a_checkpoint_of_its_own_modules(published) -> None:
    others = {"flashsvd_encoder", "flashsvd_gpt2"}  # test_head_factors.py, test_gpt2_blocks.py
    assert {published(case).family for case in CASES} | others == {f.name for f in FAMILIES if not f.refusal}


def test_methods_without_a_form_name_families_that_are_read() -> None:
    read = {family.name for family in FAMILIES if not family.refusal}
    for method, how in WITHOUT_FORM:
        named = set(re.findall(r"`(\w+)`", how))
        assert named <= read and method not in {family.name for family in FAMILIES}


@pytest.mark.parametrize("family", [family for family in FAMILIES if family.refusal], ids=lambda family: family.name)
def test_families_that_are_not_read_are_named(family) -> None:
    words = f"model is {re.escape(family.description)} .*not read yet: {re.escape(family.refusal)}"
    dense = [f"{module}.weight" for module in MODULES]
    if family.name in REFUSED_NAMES:
        with pytest.raises(ConversionError, match=words):
            found([*dense, REFUSED_NAMES[family.name]])


@pytest.mark.parametrize(("key", "value"), [("low_rank_schema", "UV"), ("low_rank_format_version", 2)])
def test_unknown_version_of_a_known_export_is_refused(key: str, value: object) -> None:
    config = {"low_rank_modules": {Q: 3}, "low_rank_schema": "ABLinear", "low_rank_format_version": 1, key: value}
    with pytest.raises(ConversionError, match=f"{key} is {value!r}"):
        found([f"{Q}.ALinear.weight"], config)


def test_names_and_descriptions_are_unique_and_the_last_family_takes_everything() -> None:
    assert (
        len({family.name for family in FAMILIES}) == len({family.description for family in FAMILIES}) == len(FAMILIES)
    )
    assert found(["anything"]) == FAMILIES[-1].name == "dense"
    readable = {family.name for family in FAMILIES if family.pairs}
    assert readable.isdisjoint(family.name for family in FAMILIES if family.refusal)


def test_rule_fills_in_module_parent_and_stem() -> None:
    rule = PairRule("{parent}.{stem}_v_proj.weight", "{module}.U.weight")
    assert rule.names(Q) == ("model.layers.0.self_attn.q_v_proj.weight", f"{Q}.U.weight")
    assert rule.matches("model.layers.12.mlp.down_v_proj.weight") and rule.matches("lm_head.U.weight")
    for name in (f"{Q}.U.weight2", f"x.{Q}.U.weight", f"{Q}_U.weight", "model.layers.x.mlp.up_proj.U.weight"):
        assert not rule.matches(name)


def test_bias_may_be_on_the_second_factor_the_module_or_the_block() -> None:
    assert bias_names(Q, f"{Q}.U.weight") == (f"{Q}.U.bias", f"{Q}.bias", "model.layers.0.self_attn.q_bias")


@pytest.mark.parametrize(
    ("first", "second", "reading"),
    [
        ((3, 5), (7, 3), "as named"),
        ((7, 3), (3, 5), "swapped"),
        ((3, 7), (5, 3), "neither"),  # of the transposed weight
        ((3, 5), (7, 4), "neither"),
        ((3, 5), (7,), "neither"),
        ((5, 5), (7, 5), "as named"),  # full rank, not square
        ((0, 5), (7, 0), "neither"),
    ],
)
def test_shapes_tell_the_order(first, second, reading) -> None:
    assert read_shapes(first, second, d_out=7, d_in=5) == reading


def test_only_square_factors_of_full_rank_leave_the_order_open() -> None:
    assert read_shapes((5, 5), (5, 5), d_out=5, d_in=5) == "either"
    assert read_shapes((4, 5), (5, 4), d_out=5, d_in=5) == "as named"


def test_names_of_parameters() -> None:
    assert torch_name("layers_10.self_attn.q_norm.scale") == "model.layers.10.self_attn.q_norm.weight"
    assert torch_name("norm.scale") == "model.norm.weight"
    assert torch_name("embed_tokens.weight") == "model.embed_tokens.weight"
    assert torch_name("layers_0.mlp.up_proj") == "model.layers.0.mlp.up_proj"
    assert torch_name("lm_head") == "lm_head"


@pytest.mark.parametrize(
    ("name", "dropped"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", True),
        ("model.rotary_emb.original_inv_freq", True),
        ("model.layers.0.self_attn.rotary_emb.cos_cached", True),
        ("model.layers.0.self_attn.sin_cached", True),
        ("transformer.h.0.attn.bias", True),
        ("transformer.h.0.attn.masked_bias", True),
        ("model.layers.0.self_attn.q_proj.bias", False),
        ("model.layers.0.self_attn.q_bias", False),
        ("model.layers.0.mlp.bias", False),
        ("model.rotary_emb.inv_freq.weight", False),
    ],
)
def test_only_buffers_are_dropped(name: str, dropped: bool) -> None:
    assert is_buffer(name) is dropped
