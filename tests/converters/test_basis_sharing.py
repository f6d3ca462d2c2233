"""Bases that layers share stay one array, from the file to the device; what contradicts the groups is refused."""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from basis_sharing import BLOCKS, GROUPS
from folder_logits import folder_logits
from published_checkpoints import Published, save_safetensors, write_config

from converters import convert
from flashsvd_jax.checkpoint import open_folder
from flashsvd_jax.errors import ConversionError
from flashsvd_jax.loading import load_weights
from flashsvd_jax.models.weights import build_weights

TOKENS = np.random.default_rng(0).integers(0, 97, (2, 11)).astype(np.int32)
BASIS = "model.q_basis.{}.weight"
IN_BLOCK = "model.layers.{}.self_attn.q_basis.weight"
OWNERS = {
    f"layers_{layer}.{block}.{stem}_proj.down": f"layers_{group[0]}.{block}.{stem}_proj.down"
    for stem, block in BLOCKS.items()
    for group in GROUPS[stem]
    for layer in group[1:]
}

Tensors = dict[str, torch.Tensor]


def changed(source: Published, folder: Path, change: Callable[[Tensors, dict[str, Any]], object]) -> Path:
    """The checkpoint without ties, with other tensors or another configuration."""
    tensors = {name: tensor.clone() for name, tensor in source.model.state_dict().items()}
    config = json.loads((source.path / "config.json").read_text())
    change(tensors, config)
    return save_safetensors(folder, tensors, config)


def test_layers_of_a_group_hold_one_array_in_the_file_and_on_the_device(converted) -> None:
    result = converted("basis_sharing")
    assert result.report.config.factorization.owner_by_name == OWNERS
    assert result.report.params == sum(tensor.numel() for tensor in result.source.model.parameters())
    with open_folder(result.path) as folder:
        build = functools.partial(build_weights, result.report.config)
        layers = load_weights(folder, build, "never", None, progress=False).layers
    for name in ("qkv", "gate_up", "o", "down"):
        buffers = [getattr(layer, name).first.unsafe_buffer_pointer() for layer in layers]
        shared = name in ("qkv", "gate_up")
        assert len(set(buffers)) == (2 if shared else 4) and (buffers[0] == buffers[1]) is shared


def leave_one_name(tensors: Tensors, _: object) -> None:
    """As savers do that keep one name of tied tensors, whichever comes first or last."""
    for name in [BASIS.format(0), BASIS.format(1), IN_BLOCK.format(1), BASIS.format(2), *map(IN_BLOCK.format, (2, 3))]:
        del tensors[name]


@pytest.mark.parametrize("change", [lambda t, c: None, leave_one_name], ids=["copies", "one name"])
def test_configuration_tells_what_is_shared_where_the_file_does_not(change, converted, tmp_path) -> None:
    result = converted("basis_sharing")
    path = changed(result.source, tmp_path / "in", change)
    report = convert(path, tmp_path / "out", dtype="float32", verify=True, progress=False)
    assert report.config == result.report.config
    np.testing.assert_array_equal(folder_logits(tmp_path / "out", TOKENS), folder_logits(result.path, TOKENS))


def test_without_a_configuration_ties_tell_what_is_shared(converted, tmp_path) -> None:
    result = converted("basis_sharing")
    config = {
        key: value
        for key, value in json.loads((result.source.path / "config.json").read_text()).items()
        if not key.endswith("_groups") and not key.startswith("num_basis_") and key != "architectures"
    }
    base = write_config(tmp_path / "base", config)
    path = shutil.copy(result.source.path / "pytorch_model.bin", tmp_path / "weights.bin")
    report = convert(path, tmp_path / "out", base=base, dtype="float32", verify=True, progress=False)
    assert report.config == result.report.config


def test_configuration_does_not_keep_what_the_family_added(converted) -> None:
    written = json.loads((converted("basis_sharing").path / "config.json").read_text())
    assert not [key for key in written if key.endswith("_groups") or key.startswith("num_basis_")]
    assert "architectures" not in written


def change_one_copy(tensors: Tensors, _: object) -> None:
    tensors[BASIS.format(1)][0, 0] += 1


def drop_a_basis(tensors: Tensors, _: object) -> None:
    for layer in (2, 3):
        del tensors[BASIS.format(layer)], tensors[IN_BLOCK.format(layer)]


def transpose_a_basis(tensors: Tensors, config: dict[str, Any]) -> None:
    del config["num_basis_q"]
    for name in [name for name in tensors if "q_basis" in name]:
        tensors[name] = tensors[name].T.contiguous()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (change_one_copy, "q_basis.* differs from .*q_basis.*one basis, that of layers .0, 1. .q_groups in config.json"),
        (lambda t, c: c.update(q_groups=[[0, 2]]), "differs from .*that of layers .0, 2. .q_groups"),
        (lambda t, c: c.update(q_groups=[0, 1]), "q_groups in config.json is not a list of lists of layers"),
        (lambda t, c: c.update(num_basis_q=4), r"num_basis_q in config.json is 4, model.q_basis.0.weight is \[5, 40\]"),
        (drop_a_basis, r"layers.2.self_attn.q_proj.weight \[56, 5\] holds coefficients .*no basis of layers \[2, 3\]"),
        (lambda t, c: (drop_a_basis(t, c), c.pop("num_basis_q")), r"mis-shaped: .*2.self_attn.q_proj.weight is \[56, 5\]"),
        (lambda t, c: t.pop("model.layers.3.mlp.up_proj.weight"), "missing: model.layers.3.mlp.up_proj.weight"),
        (transpose_a_basis, r"do not form the weight \[56, 40\]"),
    ],
)  # fmt: skip
def test_wrong_checkpoints_are_refused(change, words: str, published, tmp_path) -> None:
    path = changed(published("basis_sharing"), tmp_path / "in", change)
    with pytest.raises(ConversionError, match=words) as caught:
        convert(path, tmp_path / "out", progress=False)
    assert str(path) in str(caught.value) and not (tmp_path / "out").exists()


def test_coefficients_of_full_rank_are_no_dense_weight(published, tmp_path) -> None:
    """Without their basis they have a dense weight's shape, and only the configuration tells."""

    def widen(tensors: Tensors, config: dict[str, Any]) -> None:
        drop_a_basis(tensors, config)
        config["num_basis_q"] = 40
        for layer in range(4):
            tensors[f"model.layers.{layer}.self_attn.q_proj.weight"] = torch.ones(56, 40)
            if layer < 2:
                tensors |= {name.format(layer): torch.ones(40, 40) for name in (BASIS, IN_BLOCK)}

    path = changed(published("basis_sharing"), tmp_path / "in", widen)
    with pytest.raises(ConversionError, match=r"holds coefficients .*no basis of layers \[2, 3\]"):
        convert(path, tmp_path / "out", progress=False)
