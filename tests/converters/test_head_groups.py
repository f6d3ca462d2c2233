"""Palu's groups of heads and QSVD's shared first factors: what is stored, what they generate, and what is refused."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from compiled_decoder import prefill_logits, used_cache
from folder_logits import folder_logits
from published_checkpoints import MODULES, Published, save_safetensors, state_dict

from converters import convert
from flashsvd_jax.checkpoint import open_folder
from flashsvd_jax.config import ModelConfig
from flashsvd_jax.errors import ConversionError
from flashsvd_jax.loading import load_weights
from flashsvd_jax.models.decoder import decode
from flashsvd_jax.models.weights import build_weights

Tensors = dict[str, torch.Tensor]
K, V = MODULES[1], MODULES[2]


def changed(source: Published, folder: Path, change: Callable[[Tensors, dict[str, Any]], object]) -> Path:
    tensors = {name: tensor.clone() for name, tensor in state_dict(source.model).items()}
    config = json.loads((source.path / "config.json").read_text())
    change(tensors, config)
    return save_safetensors(folder, tensors, config)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, c: t.pop(f"{K}.U.0.weight"), f"{K}: VT or one of 1 U is missing"),
        (lambda t, c: t.pop(f"{K}.U.1.bias"), f"{K}: VT or one of 2 U is missing"),
        (lambda t, c: t.pop(f"{K}.VT.weight"), f"{K}: VT or one of 2 U is missing"),
        (lambda t, c: t.update({f"{K}.U.1.weight": torch.ones(13, 5)}), rf"{K}: its U have \[14, 3\], \[13, 5\]"),
        (lambda t, c: t.update({f"{K}.U.1.weight": torch.ones(14, 6)}), rf"gives {K} ranks \[3, 5\], .*say \[3, 6\]"),
        (lambda t, c: t.update({f"{K}.VT.weight": torch.ones(9, 40)}), rf"{K}.VT.weight is \[9, 40\], its U need 8 rows"),
        (lambda t, c: t.update({f"{K}.U.1.bias": torch.ones(15)}), rf"{K}: its biases have \[14\], \[15\]"),
        (lambda t, c: c["head_wise_ranks"].pop(K), f"gives {K} ranks None"),
        (lambda t, c: c["head_wise_ranks"].update({MODULES[0]: [4]}), f"head_wise_ranks names {MODULES[0]}"),
        (lambda t, c: c.update(num_key_value_heads=4), rf"mis-shaped: {K}.VT.weight .* do not form the weight \[56, 40\]"),
    ],
)  # fmt: skip
def test_wrong_checkpoints_of_palu_are_refused(change, words: str, published, tmp_path) -> None:
    path = changed(published("palu"), tmp_path / "in", change)
    with pytest.raises(ConversionError, match=words) as caught:
        convert(path, tmp_path / "out", progress=False)
    assert str(path) in str(caught.value) and not (tmp_path / "out").exists()


def test_groups_of_lower_rank_are_filled_up_with_zeros(converted) -> None:
    result = converted("palu")
    tensors = state_dict(result.source.model)
    assert result.report.config.factorization.groups == (
        ("layers_0.self_attn.k_proj", 2), ("layers_1.self_attn.k_proj", 2), ("layers_1.self_attn.v_proj", 2),
    )  # fmt: skip
    with open_folder(result.path) as folder:
        down, up = (folder.get(f"layers_0.self_attn.k_proj.{part}") for part in ("down", "up"))
    assert down.shape == (10, 40) and up.shape == (2, 14, 5)
    assert not down[3:5].any() and not up[0, :, 3:].any()
    np.testing.assert_array_equal(np.delete(down, (3, 4), 0), tensors[f"{K}.VT.weight"])


def test_configuration_does_not_keep_what_palu_added(converted) -> None:
    written = json.loads((converted("palu-mistral").path / "config.json").read_text())
    assert (
        written["model_type"] == "mistral" and not {"head_wise_ranks", "original_model_name_or_path"} & written.keys()
    )


@pytest.mark.parametrize("case", ["palu", "qsvd"])
def test_steps_through_the_cache_give_the_logits_of_whole_sequences(case: str, converted) -> None:
    path, tokens = converted(case).path, np.random.default_rng(0).integers(0, 97, (2, 9)).astype(np.int32)
    with open_folder(path) as folder:
        config = folder.config
        assert isinstance(config, ModelConfig)
        weights = load_weights(folder, functools.partial(build_weights, config), "never", None, progress=False)
    cache, _ = prefill_logits(config, weights, used_cache(config, 2, 16), tokens[:, :5], np.full(2, 5, np.int32))
    step, wanted = jax.jit(decode, static_argnums=0), folder_logits(path, tokens)
    for position in range(5, 9):
        cache, logits, _ = step(config, weights, cache, tokens[:, position], np.full(2, position, np.int32))
        np.testing.assert_allclose(logits, wanted[:, position], rtol=0, atol=1e-4)


def test_one_first_factor_of_query_key_and_value_is_stored_once(converted) -> None:
    result = converted("qsvd")
    shared = {f"layers_0.self_attn.{leaf}.down": "layers_0.self_attn.q_proj.down" for leaf in ("k_proj", "v_proj")}
    assert result.report.config.factorization.owner_by_name == shared
    copies = sum(p.numel() for p in result.source.model.parameters())
    assert result.report.params == copies - 2 * 5 * 44


def test_first_factors_that_differ_anywhere_are_not_shared(published, tmp_path) -> None:
    source = published("qsvd")
    state = {name: tensor.clone() for name, tensor in source.model.state_dict().items()}
    state[f"{K}.BLinear.weight"][-1, -1] += 1
    torch.save({"model": state}, tmp_path / "changed.pth")
    report = convert(tmp_path / "changed.pth", tmp_path / "out", base=source.base, dtype="float32", progress=False)
    assert dict(report.config.factorization.shared).keys() == {"layers_0.self_attn.v_proj.down"}
    with open_folder(tmp_path / "out") as folder:
        down = folder.get("layers_0.self_attn.k_proj.down")
    np.testing.assert_array_equal(down, state[f"{K}.BLinear.weight"])
