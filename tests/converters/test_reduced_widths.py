"""Eigen Attention and MoDeGPT: what is kept of their savings, and which checkpoints are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from published_checkpoints import KEPT, Published, base_model, hf_config, save_safetensors, state_dict

from converters import convert
from flashsvd_jax.checkpoint import open_folder
from flashsvd_jax.errors import ConversionError

Tensors = dict[str, torch.Tensor]
ATTENTION = "model.layers.0.self_attn"


def changed(source: Published, folder: Path, change: Callable[[Tensors, dict[str, Any], list], object]) -> Path:
    """The checkpoint with other tensors, another configuration, or other kept columns."""
    tensors = {name: tensor.clone() for name, tensor in state_dict(source.model).items()}
    config, kept = json.loads((source.path / "config.json").read_text()), list(KEPT)
    change(tensors, config, kept)
    save_safetensors(folder, {name: tensor.contiguous() for name, tensor in tensors.items()}, config)
    if kept:
        torch.save(kept, folder / "rotary_masks.pt")
    return folder


def put(name: str, *shape: int) -> Callable[[Tensors, object, object], None]:
    return lambda tensors, *_: tensors.update({f"{ATTENTION}.{name}": torch.ones(shape)})


@pytest.mark.parametrize(
    ("case", "change", "words"),
    [
        ("eigen_attention", lambda t, *_: t.pop(f"{ATTENTION}.k_proj_up.weight"), "k_proj_up.weight is missing"),
        ("eigen_attention", put("k_proj_up.weight", 10, 6), r"k_proj_up.weight is \[10, 6\], not \[10, 5\]"),
        ("eigen_attention", lambda t, *_: t.pop(f"{ATTENTION}.o_proj_up.weight"), "o_proj_up.weight is missing"),
        (
            "eigen_attention",
            put("v_proj_low.weight", 8, 40),
            "v_proj_low.weight has heads of 4, .*o_proj_up.weight of 3",
        ),
        ("eigen_attention", put("v_proj_low.weight", 7, 40), r"\[7, 40\], which is not 2 heads of at most 10"),
        ("eigen_attention", put("v_proj_low.bias", 7), r"v_proj_low.bias is \[7\], not \[6\]"),
        (
            "eigen_attention",
            lambda t, c, _: c.update(model_type="qwen3"),
            "Eigen Attention, of which only Llama's form",
        ),
        ("modegpt", put("v_proj.weight", 12, 40), "the heads of a layer must have one width: .*v_proj.weight 6"),
        ("modegpt", put("q_proj.weight", 60, 40), r"q_proj.weight 15|\[60, 40\], which is not 4 heads of at most 14"),
        ("modegpt", lambda t, c, _: c["k_ranks"].reverse(), "k_ranks in config.json does not say 8 for layer 0"),
        ("modegpt", lambda t, c, _: c["gate_ranks"].pop(), "gate_ranks in config.json does not say 38 for layer 1"),
        ("modegpt", lambda t, c, k: k.clear(), "names rotary_masks.pt, which is not beside the weights"),
        ("modegpt", lambda t, c, k: k.pop(), "does not hold the kept columns of 2 layers"),
        ("modegpt", lambda t, c, k: k.reverse(), r"kept columns of layer 0, \[2, 12\], are not 2 heads of 2 pairs"),
        (
            "modegpt",
            lambda t, c, k: k.__setitem__(0, k[0].flip(1)),
            "are not 2 heads of 2 pairs of columns i and i . 7",
        ),
        ("modegpt", lambda t, c, k: k.__setitem__(0, k[0] + 7), "are not 2 heads of 2 pairs"),
        ("modegpt", lambda t, c, k: k.__setitem__(0, k[0].float()), "are not 2 heads of 2 pairs"),
        (
            "modegpt",
            lambda t, c, _: c.update(mask_path=None),
            "layer 0 has heads of 4, but mask_path names no kept columns",
        ),
        (
            "modegpt",
            lambda t, *_: t.pop("model.layers.1.mlp.gate_proj.weight"),
            "layers.1.mlp.gate_proj.weight is missing",
        ),
        (
            "modegpt",
            lambda t, *_: t.update({"model.layers.1.mlp.down_proj.weight": torch.ones(40, 51)}),
            r"down_proj.weight is \[40, 51\], not 38 columns",
        ),
        (
            "modegpt",
            lambda t, *_: t.update({"model.layers.1.mlp.up_proj.weight": torch.ones(51, 40)}),
            r"up_proj.weight is \[51, 40\], not 38 rows",
        ),
    ],
)
def test_wrong_checkpoints_are_refused(case: str, change, words: str, published, tmp_path) -> None:
    path = changed(published(case), tmp_path / "in", change)
    with pytest.raises(ConversionError, match=words) as caught:
        convert(path, tmp_path / "out", progress=False)
    assert str(path) in str(caught.value) and not (tmp_path / "out").exists()


def test_rows_are_kept_as_they_are_beside_factors_of_zeros_and_ones(converted) -> None:
    result = converted("modegpt")
    tensors = state_dict(result.source.model)
    with open_folder(result.path) as folder:
        assert dict(folder.config.factorization.groups) == {
            f"layers_0.self_attn.{name}_proj": number for name, number in (("q", 4), ("k", 2), ("v", 2))
        }
        for name, value in (("q", 3.5**0.5), ("k", 1.0), ("v", 1.0)):
            down, up = (folder.get(f"layers_0.self_attn.{name}_proj.{part}") for part in ("down", "up"))
            np.testing.assert_array_equal(down, tensors[f"{ATTENTION}.{name}_proj.weight"])
            assert set(np.unique(up)) == {0, np.float32(value)} and (up != 0).sum() == len(up) * 4
        assert folder.config.intermediate_size == 51  # of the widest layer, not of the base model
        gate, down = folder.get("layers_1.mlp.gate_proj.weight"), folder.get("layers_1.mlp.down_proj.weight")
    assert not gate[38:].any() and not down[:, 38:].any() and gate[:38].any(1).all()


def test_the_cache_is_said_to_be_as_wide_as_the_base_models(converted) -> None:
    for case in ("eigen_attention", "modegpt"):
        (note,) = (note for note in converted(case).report.notes if "narrow heads" in note)
        assert note.endswith("within heads of the base model's width, and so is the cache")


def test_the_configuration_of_modegpt_alone_does_not_make_a_dense_model_narrow(tmp_path) -> None:
    model = base_model("llama")
    path = save_safetensors(tmp_path / "in", state_dict(model), hf_config(model, q_ranks=[48, 48], mask_path=None))
    report = convert(path, tmp_path / "out", dtype="float32", progress=False)
    assert not report.config.factorization
    with open_folder(tmp_path / "out") as folder:
        want = model.get_parameter(f"{ATTENTION}.q_proj.weight").detach().numpy()
        np.testing.assert_array_equal(folder.get("layers_0.self_attn.q_proj.weight"), want)


def test_a_file_of_eigen_attentions_ranks_is_no_weights(published, tmp_path) -> None:
    source = published("eigen_attention")
    changed(source, tmp_path / "in", lambda t, c, k: k.clear())
    (tmp_path / "in" / "model.safetensors").rename(tmp_path / "in" / "weights.safetensors")
    torch.save([[10, 6], [12, 8]], tmp_path / "in" / "low_rank_config.pt")
    assert convert(tmp_path / "in", tmp_path / "out", progress=False).family == "eigen_attention"
