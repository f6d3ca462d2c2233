"""What a GPU computes in double precision, by way of JAX, is what numpy computes; here JAX has a CPU for it."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from truncation import draw_inputs, draw_weight

from flashsvd_jax import bundled
from flashsvd_jax.checkpoint import open_folder
from flashsvd_jax.compress import Calibration, Recipe, compress
from flashsvd_jax.compress.alignment import AlignedLoss
from flashsvd_jax.compress.factors import Loss, factorize, gains, refit
from flashsvd_jax.compress.float64 import float64_module

CALIBRATION = Calibration(bundled.CALIBRATION.read_text(encoding="utf-8")[:5000], "text.txt", 4, 48, 1)


@pytest.fixture
def by_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with float64_module() as xp:
        assert xp is jnp and xp.ones(1, xp.float64).dtype == np.float64
    assert jnp.ones(1, jnp.float32).dtype == np.float32


@pytest.mark.usefixtures("by_jax")
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
@pytest.mark.parametrize("kind", ["correlated", "singular", "dead"])
def test_factors_gains_and_updates(shape: tuple[int, int], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = draw_weight(*shape), draw_inputs(kind, shape[1])
    fisher = np.random.default_rng(0).uniform(0.1, 1, shape[0])

    def results() -> list[np.ndarray]:
        loss = Loss(fisher, x.T @ x)
        up, down = factorize(weight, 9, loss)
        refitted = refit(weight, factorize(weight, 9, Loss()), x.T @ x)
        aligned = factorize(weight, 9, AlignedLoss(inputs=x.T @ x, shift=np.roll(x, 1, 0).T @ x))
        made = [product.up @ product.down for product in (refitted, aligned)]
        return [up @ down, gains(weight, loss), *made, np.array(loss.trace(*shape))]

    found = results()
    monkeypatch.undo()
    for one, other in zip(found, results(), strict=True):
        assert type(one) is np.ndarray and one.dtype == np.float64
        np.testing.assert_allclose(one @ x.T if one.shape == shape else one, other @ x.T if one.shape == shape else other,
                                   rtol=1e-7, atol=1e-9 * np.abs(other).max() * np.abs(x).max())  # fmt: skip


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe("drone", 0.5, "greedy", update=True),
        Recipe("basis_sharing", 0.5),
        Recipe("saes", 0.5),
    ],
    ids=lambda recipe: recipe.method,
)
def test_whole_models(
    recipe: Recipe, dense: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    compress(dense.folder, tmp_path / "numpy", recipe, CALIBRATION)
    request.getfixturevalue("by_jax")
    compress(dense.folder, tmp_path / "jax", recipe, CALIBRATION)
    monkeypatch.undo()
    with open_folder(tmp_path / "numpy") as one, open_folder(tmp_path / "jax") as other:
        assert one.config == other.config
        for site, _ in one.config.factorization.ranks:
            products = [opened.get(f"{site}.up") @ opened.get(f"{site}.down") for opened in (one, other)]
            np.testing.assert_allclose(*products, rtol=0, atol=1e-4 * np.abs(products[0]).max())
