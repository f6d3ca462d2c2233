"""Factors of single heads against numpy, head by head, on random correlated inputs."""

import numpy as np
import pytest
from truncation import best, draw_inputs, draw_weight

from flashsvd_jax.compress.factors import Factors, Loss, refit
from flashsvd_jax.compress.heads import factorize_groups, gains_of_groups, multiplied, refit_groups
from flashsvd_jax.compress.methods import METHODS, Statistics

HEADS, HEAD_DIM, D_IN = 5, 8, 24


def products(factors: Factors) -> list[np.ndarray]:
    """Each head's, from its rows of either factor."""
    rank = factors.up.shape[-1]
    return [factors.up[head] @ factors.down[head * rank : (head + 1) * rank] for head in range(HEADS)]


def heads_of(weight: np.ndarray) -> list[np.ndarray]:
    return [weight[head * HEAD_DIM : (head + 1) * HEAD_DIM] for head in range(HEADS)]


@pytest.mark.parametrize("method", ["svd", "asvd", "drone", "fwsvd"])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_each_head_is_what_its_rows_give_alone(method: str, rank: int) -> None:
    weight, x = draw_weight(HEADS * HEAD_DIM, D_IN), draw_inputs("correlated", D_IN)
    rows = np.random.default_rng(3).uniform(0.1, 2, len(weight))
    loss = METHODS[method].loss(Statistics(moment=x.T @ x, magnitude=np.abs(x).sum(0), fisher=rows))
    scales = {"svd": np.eye(D_IN), "asvd": np.diag(np.abs(x).mean(0) ** 0.5), "drone": np.linalg.cholesky(x.T @ x)}
    scale = scales.get(method, np.eye(D_IN))
    found = factorize_groups(weight, rank, loss, HEADS)
    assert found.up.shape == (HEADS, HEAD_DIM, rank) and found.down.shape == (HEADS * rank, D_IN)
    of_rows = heads_of(rows[:, None]) if method == "fwsvd" else [np.ones((HEAD_DIM, 1))] * HEADS
    expected = [
        np.linalg.solve(scale.T, best(np.sqrt(d) * head @ scale, rank).T).T / np.sqrt(d)
        for head, d in zip(heads_of(weight), of_rows, strict=True)
    ]
    np.testing.assert_allclose(products(found), expected, atol=1e-8)
    np.testing.assert_allclose(multiplied(*found), np.concatenate(expected), atol=1e-4)


def test_gains_of_heads_add_up() -> None:
    weight, x = draw_weight(HEADS * HEAD_DIM, D_IN), draw_inputs("correlated", D_IN)
    energies = [np.linalg.svd(head @ x.T, compute_uv=False) ** 2 for head in heads_of(weight)]
    found = gains_of_groups(weight, Loss(inputs=x.T @ x), HEADS)
    np.testing.assert_allclose(found, np.sum(energies, axis=0), rtol=1e-9)


def test_an_update_is_each_heads_own() -> None:
    weight, x = draw_weight(HEADS * HEAD_DIM, D_IN), draw_inputs("correlated", D_IN)
    before = factorize_groups(weight, 3, Loss(), HEADS)
    after = refit_groups(weight, before, x.T @ x)
    assert np.array_equal(after.down, before.down)
    for head, up, old in zip(heads_of(weight), after.up, range(HEADS), strict=True):
        down = before.down[3 * old : 3 * old + 3]
        np.testing.assert_allclose(up, np.linalg.lstsq(x @ down.T, x @ head.T)[0].T, atol=1e-7)


def test_one_group_is_the_whole_weight() -> None:
    weight, x = draw_weight(24, 40), draw_inputs("correlated", 40)
    found = factorize_groups(weight, 9, Loss(inputs=x.T @ x), 1)
    assert found.up.shape == (24, 9)
    np.testing.assert_array_equal(refit_groups(weight, found, x.T @ x).up, refit(weight, found, x.T @ x).up)
