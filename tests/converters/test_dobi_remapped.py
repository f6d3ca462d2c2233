"""Dobi-SVD's 8-bit codes: decoded to the bit as PyTorch does it, and refused where they form no factors."""

import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from dobi_remapping import codebook, decode
from published_checkpoints import MODULES

from converters import convert
from converters.sources import open_source
from converters.sources.remapped_source import dynamic_map
from flashsvd_jax.errors import CheckpointError, FlashSVDError

K, UP = "model.layers.0.self_attn.k_proj", "model.layers.0.mlp.up_proj"


def test_codebook_is_pytorchs_with_the_published_edges() -> None:
    values = dynamic_map()
    np.testing.assert_array_equal(values, codebook().numpy())
    assert values.shape == (256,) and (np.diff(values) > 0).all()
    assert (values[0], values[127], values[255]) == (np.float32(-0.99296875), 0, 1)


def test_factors_are_decoded_to_the_bit(published) -> None:
    path = published("dobi_remapped").path
    codes = torch.load(path / "remapping_weight.pt")
    with open_source(path) as source:
        for module in MODULES:
            for name, want in zip(("us.weight", "vt.weight"), decode(codes[module]), strict=True):
                got = source.get(f"{module}.{name}")
                assert got.dtype == np.float16 and got.shape == source.infos()[f"{module}.{name}"].shape
                np.testing.assert_array_equal(got.view(np.uint16), want.numpy().view(np.uint16))


def test_the_file_of_codes_stands_for_its_folder(published, tmp_path) -> None:
    path = published("dobi_remapped").path
    report = convert(path / "remapping_weight.pt", tmp_path / "out", verify=True, progress=False)
    assert (report.family, report.dtype) == ("dobi_remapped", "float16")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c[K].pop("vt_absmax"), f"lacks {K}.vt_absmax"),
        (lambda c: c[K].update(us_quan=c[K]["us_quan"].short()), f"{K}.us_quan is int16, not uint8"),
        (lambda c: c[K].update(us_quan=c[K]["us_quan"][:, :-1]), f"the shapes of {K} form no two factors"),
        (lambda c: c[K].update(us_absmax=c[K]["us_absmax"][:-1]), f"the shapes of {K} form no two factors"),
        (lambda c: c[UP].update(tuple_info=None), f"{UP}.vt.weight .* do not form the weight .58, 44."),
        (lambda c: c.pop(K), f"missing: {K}.weight"),
        (lambda c: c.update(extra=torch.ones(3)), "holds no codes of factors: extra"),
    ],
)
def test_wrong_codes_are_refused(change: Callable[[dict[str, Any]], object], words: str, published, tmp_path) -> None:
    path = shutil.copytree(published("dobi_remapped").path, tmp_path / "in")
    codes = torch.load(path / "remapping_weight.pt")
    change(codes)
    torch.save(codes, path / "remapping_weight.pt")
    with pytest.raises(FlashSVDError, match=words):
        convert(path, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_codes_without_the_rest_of_the_model_are_refused(published, tmp_path) -> None:
    shutil.copy(published("dobi_remapped").path / "remapping_weight.pt", tmp_path)
    with pytest.raises(CheckpointError, match=r"holds no weight file; it holds remapping_weight\.pt"):
        convert(tmp_path, tmp_path / "out", progress=False)
