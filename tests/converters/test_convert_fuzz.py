"""Checkpoints that nobody wrote by hand: mixtures convert exactly, damage gives one error and no folder."""

import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from published_checkpoints import MODULES, base_model, hf_config, publish, state_dict, write_config

from converters import FAMILIES, convert
from converters.naming import torch_name
from flashsvd_jax.checkpoint import open_folder
from flashsvd_jax.errors import CheckpointError, ConversionError, FlashSVDError
from flashsvd_jax.schema import sites

# Those whose tensors have the names of the pairs; others are damaged in the forms they have.
FAMILY = {
    family.name: family
    for family in FAMILIES
    if family.pairs and (family.view is None or family.name in ("basis_sharing", "bare_ab"))
}
REMADE = ("corda", "fisher_svd", "palu", "eigen_attention", "modegpt")
CLAIMS: dict[str, dict[str, Any]] = {
    "lowrankarena": {"model_type": "lowrank_qwen2"},
    "dobi": {"architectures": ["DobiSVDQwen2ForCausalLM"]},
    "asvd": {"model_type": "asvd_qwen2"},
    "svdllm_hf": {"architectures": ["SVDLLMQwen2ForCausalLM"]},
}
LIMITS = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


@functools.cache
def dense() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A model with biases, and its configuration."""
    model = base_model("qwen2")
    return state_dict(model), hf_config(model)


def factorized(family: str, ranks: dict[str, int]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The state dict of a family with these ranks, and the product of the factors of every module."""
    tensors, products = dict(dense()[0]), {}
    generator = torch.Generator().manual_seed(0)
    for module, rank in ranks.items():
        d_out, d_in = tensors.pop(f"{module}.weight").shape
        first, second = FAMILY[family].pairs[0].names(module)
        tensors[first] = torch.randn(rank, d_in, generator=generator)
        tensors[second] = torch.randn(d_out, rank, generator=generator)
        products[module] = tensors[second].double() @ tensors[first].double()
        if (bias := tensors.pop(f"{module}.bias", None)) is not None:
            tensors[second.replace(".weight", ".bias")] = bias
    return {FAMILY[family].prefix + name: tensor for name, tensor in tensors.items()}, products


def save(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Path:
    write_config(folder, config)
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


ranks = st.dictionaries(st.sampled_from(MODULES), st.integers(1, 24), min_size=1)


@LIMITS
@given(family=st.sampled_from(sorted(FAMILY)), ranks=ranks)
def test_any_mixture_of_dense_and_low_rank_sites_converts(family: str, ranks: dict[str, int]) -> None:
    tensors, products = factorized(family, ranks)
    if family == "bare_ab":
        assume(any(rank != 20 for rank in ranks.values()))
    with tempfile.TemporaryDirectory() as place:
        source = save(Path(place) / "in", tensors, dense()[1] | CLAIMS.get(family, {}))
        report = convert(source, Path(place) / "out", dtype="float32", verify=True, progress=False)
        assert report.family == family
        assert {torch_name(site): rank for site, rank in report.config.factorization.ranks} == ranks
        with open_folder(Path(place) / "out") as folder:
            for site in sites(folder.config):
                module = torch_name(site.name)
                if module in ranks:
                    up, down = (folder.get(f"{site.name}.{part}").astype(np.float64) for part in ("up", "down"))
                    np.testing.assert_allclose(up @ down, products[module], rtol=1e-12, atol=1e-12)
                else:
                    np.testing.assert_array_equal(folder.get(f"{site.name}.weight"), dense()[0][f"{module}.weight"])


DAMAGES = ("drop", "rename", "transpose", "grow", "flatten", "integers", "duplicate", "nan")


@LIMITS
@given(data=st.data(), family=st.sampled_from(sorted(FAMILY)), ranks=ranks, damage=st.sampled_from(DAMAGES))
def test_any_damage_gives_one_error_and_no_folder(data, family: str, ranks: dict[str, int], damage: str) -> None:
    tensors, _ = factorized(family, ranks)
    name = data.draw(st.sampled_from(sorted(tensors)))
    tensor = tensors.pop(name)
    match damage:
        case "rename":
            tensors[name + data.draw(st.sampled_from(["_", ".weight", "s"]))] = tensor
        case "transpose":
            assume(tensor.ndim == 2 and tensor.shape[0] != tensor.shape[1])
            tensors[name] = tensor.T.contiguous()
        case "grow":
            tensors[name] = torch.cat([tensor, tensor[:1]])
        case "flatten":
            assume(tensor.ndim == 2)
            tensors[name] = tensor.reshape(-1)
        case "integers":
            tensors[name] = tensor.int()
        case "duplicate":
            tensors |= {name: tensor, f"model.{name}": tensor.clone()}
        case "nan":
            tensors[name] = tensor * torch.nan
    with tempfile.TemporaryDirectory() as place:
        source = save(Path(place) / "in", tensors, dense()[1] | CLAIMS.get(family, {}))
        with pytest.raises((ConversionError, CheckpointError)):
            convert(source, Path(place) / "out", progress=False)
        assert [path.name for path in Path(place).iterdir()] == ["in"]


KEYS = [
    *sorted({key for family in FAMILIES for key in (*family.config_keys, family.rank_map)}),
    *("model_type", "architectures", "base_config", "auto_map", "vocab_size", "hidden_size", "intermediate_size"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"),
    *("rms_norm_eps", "hidden_act", "tie_word_embeddings", "rope_parameters", "rope_scaling", "rope_theta"),
    *("sliding_window", "use_sliding_window", "layer_types", "eos_token_id", "bos_token_id"),
]
values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 200) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@LIMITS
@example(key="architectures", value=True)
@example(key="model_type", value=[])
@given(key=st.sampled_from(KEYS) | st.text(max_size=5), value=values)
def test_any_entry_of_a_configuration_converts_or_gives_one_error(key: str, value: object) -> None:
    with tempfile.TemporaryDirectory() as place:
        source = save(Path(place) / "in", dense()[0], dense()[1] | {key: value})
        try:
            convert(source, Path(place) / "out", progress=False)
        except FlashSVDError:
            assert [path.name for path in Path(place).iterdir()] == ["in"]
        else:
            with open_folder(Path(place) / "out") as folder:
                assert len(folder.stored_names()) == len(dense()[0])


@functools.cache
def remade(case: str, place: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any], list[Path]]:
    """Tensors and configuration of a family whose tensors are put together here, and the files beside them."""
    source = publish(case, place / case)
    tensors = {name: tensor.detach().clone() for name, tensor in state_dict(source.model).items()}
    beside = source.path.parent / "config.json" if source.path.is_file() else source.path / "config.json"
    config = json.loads(beside.read_text()) if beside.is_file() else hf_config(source.model)
    return tensors, config, [*source.path.glob("rotary_masks.pt")]


def damaged(tensor: torch.Tensor) -> dict[str, torch.Tensor | None]:
    """What may have become of a tensor; nothing that would be another valid one."""
    return {
        "dropped": None,
        "grown": torch.cat([tensor, tensor[:1]]) if tensor.ndim else tensor.repeat(2),
        "flat": tensor.reshape(-1, 1),
        "empty": tensor.reshape(-1)[:0].clone(),
        "of other kind": tensor.int() if tensor.is_floating_point() else tensor.float() + 0.5,
        "deep": tensor[None, None].clone(),
    }


@settings(LIMITS, max_examples=60)
@given(data=st.data(), case=st.sampled_from(REMADE))
def test_damage_to_what_is_put_together_gives_one_error_and_no_folder(data, case: str, tmp_path_factory) -> None:
    tensors, config, beside = remade(case, tmp_path_factory.getbasetemp())
    name = data.draw(st.sampled_from(sorted(tensors)))
    kind = data.draw(st.sampled_from(sorted(damaged(tensors[name]))))
    # One number tells a group's first input, as a scalar or not; more rows in a block are a larger block, if it is the only one.
    assume(not name.endswith("_col") or kind in ("dropped", "empty", "of other kind"))
    changed, tensor = dict(tensors), damaged(tensors[name])[kind]
    changed |= {} if tensor is None else {name: tensor}
    changed = changed if tensor is not None else {key: value for key, value in changed.items() if key != name}
    with tempfile.TemporaryDirectory() as place:
        source = save(Path(place) / "in", changed, config)
        for file in beside:
            shutil.copy(file, source)
        with pytest.raises(FlashSVDError):
            convert(source, Path(place) / "out", dtype="float32", progress=False)
        assert [path.name for path in Path(place).iterdir()] == ["in"]
