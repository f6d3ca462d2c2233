"""Residuals beside factors: what cannot be put together is refused, and nothing is rounded that need not be."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from published_checkpoints import MODULES, Published, save_safetensors, state_dict

from converters import convert
from flashsvd_jax.checkpoint import open_folder
from flashsvd_jax.errors import ConversionError

Tensors = dict[str, torch.Tensor]
Q, BLOCKS = MODULES[0], f"{MODULES[0]}.g1_"


def changed(source: Published, folder, change: Callable[[Tensors], object]):
    tensors = {name: tensor.clone() for name, tensor in state_dict(source.model).items()}
    change(tensors)
    return save_safetensors(folder, tensors, source.model.config.to_dict())


@pytest.mark.parametrize(
    ("case", "change", "words"),
    [
        ("corda", lambda t: t.pop(f"{Q}.BLinear.weight"), f"{Q}.weight_residual stands beside no {Q}.BLinear.weight"),
        (
            "corda",
            lambda t: t.update({f"{Q}.weight_residual": torch.ones(40, 56)}),
            r"do not form one weight: .*weight_residual \[40, 56\]",
        ),
        ("corda", lambda t: t.pop(f"{Q}.weight_residual"), f"missing: {Q}.weight"),
        ("fisher_svd", lambda t: t.pop(f"{BLOCKS}row_index"), f"{BLOCKS}row_index is missing"),
        ("fisher_svd", lambda t: t.pop(f"{Q}.u_proj.weight"), f"{Q} has blocks .*but no two factors"),
        ("fisher_svd", lambda t: t[f"{BLOCKS}col"].fill_(37), f"blocks of {Q}.g1 reach beyond the weight .56, 40."),
        ("fisher_svd", lambda t: t[f"{BLOCKS}row_index"].add_(46), f"blocks of {Q}.g1 reach beyond"),
        ("fisher_svd", lambda t: t[f"{BLOCKS}row_index"].sub_(6), f"blocks of {Q}.g1 reach beyond"),
        (
            "fisher_svd",
            lambda t: t.update({f"{BLOCKS}blocks_T": torch.ones(4, 5)}),
            rf"do not form blocks: .*{BLOCKS}blocks_T \[4, 5\]",
        ),
    ],
)
def test_wrong_checkpoints_are_refused(case: str, change, words: str, published, tmp_path) -> None:
    with pytest.raises(ConversionError, match=words):
        convert(changed(published(case), tmp_path / "in", change), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_wider_pair_holds_the_very_numbers(converted) -> None:
    result = converted("fisher_svd")
    tensors = state_dict(result.source.model)
    with open_folder(result.path) as folder:
        down, up = (folder.get(f"layers_0.self_attn.q_proj.{part}") for part in ("down", "up"))
    np.testing.assert_array_equal(down[:3], tensors[f"{Q}.v_proj.weight"].numpy())
    np.testing.assert_array_equal(up[:, :3], tensors[f"{Q}.u_proj.weight"].numpy())
    assert set(np.unique(down[3:])) == {0, 1} and down[3:].sum() == 8
    blocks = np.sort(np.concatenate([tensors[f"{Q}.g{n}_blocks_T"].numpy().ravel() for n in range(2)]))
    added = up[:, 3:]
    # The second group's blocks overlap at outputs 7 and 8: four sums there, in place of eight numbers, for each input.
    assert np.isin(added[added != 0], blocks).sum() == len(blocks) - 2 * 4 * 2


def test_dtype_is_that_of_the_checkpoint_though_sums_are_computed_wider(published, tmp_path) -> None:
    def halve(tensors: Tensors) -> None:
        tensors |= {name: tensor.half() for name, tensor in tensors.items()}

    report = convert(changed(published("corda"), tmp_path / "in", halve), tmp_path / "out", verify=True, progress=False)
    assert report.dtype == "float16"
    assert "14 projections are dense: each has a residual of full size" in "\n".join(report.notes)


def test_what_became_of_blocks_is_reported(converted) -> None:
    (note,) = (note for note in converted("fisher_svd").report.notes if "blocks" in note)
    assert (
        note == "3 projections have blocks beside their factors: 2 of them as a wider pair, 1 dense, as that is smaller"
    )
