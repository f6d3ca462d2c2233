"""Compression on a GPU: factors in float64 as numpy has them, and a whole model near one that was compressed on the CPU."""

from pathlib import Path

import jax
import numpy as np
import pytest
from truncation import draw_inputs, draw_weight

from converters import convert
from flashsvd_jax import bundled
from flashsvd_jax.checkpoint import open_folder
from flashsvd_jax.compress import Calibration, Recipe, compress
from flashsvd_jax.compress.factors import Loss, factorize, gains

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("shape", [(240, 400), (400, 240)])
@pytest.mark.parametrize("kind", ["correlated", "singular"])
def test_factors_and_gains_are_those_of_numpy(
    shape: tuple[int, int], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, x = draw_weight(*shape), draw_inputs(kind, shape[1])
    loss = Loss(inputs=x.T @ x)
    up, down = factorize(weight, 90, loss)
    assert isinstance(loss.moment, jax.Array) and loss.moment.dtype == np.float64
    found, ladder = (up @ down) @ x.T, gains(weight, loss)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    loss = Loss(inputs=x.T @ x)
    up, down = factorize(weight, 90, loss)
    expected = (up @ down) @ x.T
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-7 * np.abs(expected).max())
    np.testing.assert_allclose(ladder, gains(weight, loss), rtol=1e-7, atol=1e-9 * ladder.max())


@pytest.mark.parametrize("method", ["drone", "saes", "basis_sharing"])
def test_a_model_is_compressed_to_what_numpy_gives(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(bundled.DENSE, tmp_path / "dense", dtype="float32", progress=False)
    text = Calibration(bundled.CALIBRATION.read_text(encoding="utf-8"), "calibration.txt", 16, 256)
    compress(tmp_path / "dense", tmp_path / "gpu", Recipe(method, 0.6), text, progress=False)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    compress(tmp_path / "dense", tmp_path / "numpy", Recipe(method, 0.6), text, progress=False)
    with open_folder(tmp_path / "gpu") as one, open_folder(tmp_path / "numpy") as other:
        assert one.config == other.config
        for site, _ in one.config.factorization.ranks:
            products = [opened.get(f"{site}.up") @ opened.get(f"{site}.down") for opened in (one, other)]
            np.testing.assert_allclose(*products, rtol=0, atol=2e-3 * np.abs(products[1]).max())
