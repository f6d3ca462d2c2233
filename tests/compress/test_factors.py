"""Factors and their loss, each method against its published algorithm written down in numpy, and on singular statistics."""

import numpy as np
import pytest
from truncation import best, draw_inputs, draw_weight

from flashsvd_jax.compress.factors import Factors, Loss, factorize, gains, refit
from flashsvd_jax.compress.methods import METHODS, Statistics, method_named
from flashsvd_jax.errors import RequestError

SHAPES = [(24, 40), (40, 24), (32, 32)]
INPUTS = ["correlated", "near-singular", "singular", "few", "outliers", "dead"]


def product(factors: Factors) -> np.ndarray:
    return factors.up @ factors.down


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 9, 24])
def test_plain_svd_is_the_nearest_matrix(shape: tuple[int, int], rank: int) -> None:
    weight = draw_weight(*shape)
    np.testing.assert_allclose(product(factorize(weight, rank, Loss())), best(weight, rank), atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_fwsvd_is_the_svd_of_weighted_rows(shape: tuple[int, int]) -> None:
    weight, fisher = draw_weight(*shape), np.random.default_rng(1).uniform(1e-4, 3, shape[0])
    scale = np.sqrt(fisher)[:, None]
    found = factorize(weight, 9, METHODS["fwsvd"].loss(Statistics(fisher=fisher)))
    np.testing.assert_allclose(product(found), best(scale * weight, 9) / scale, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_asvd_is_the_svd_of_scaled_inputs(shape: tuple[int, int], alpha: float) -> None:
    weight, x = draw_weight(*shape), draw_inputs("correlated", shape[1])
    scale = np.abs(x).mean(0) ** alpha
    found = factorize(weight, 9, METHODS["asvd"].loss(Statistics(magnitude=np.abs(x).sum(0)), alpha))
    np.testing.assert_allclose(product(found), best(weight * scale, 9) / scale, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_svdllm_is_whitening_by_cholesky(shape: tuple[int, int]) -> None:
    weight, x = draw_weight(*shape), draw_inputs("correlated", shape[1])
    whitening = np.linalg.cholesky(x.T @ x)
    found = factorize(weight, 9, METHODS["svdllm"].loss(Statistics(moment=x.T @ x)))
    expected = np.linalg.solve(whitening.T, best(weight @ whitening, 9).T).T
    np.testing.assert_allclose(product(found), expected, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_drone_is_its_closed_form(shape: tuple[int, int]) -> None:
    """Chen et al. 2021, theorem 1: SVDs of the weight and of the inputs, and one of the product of what is between them."""
    weight, x = draw_weight(*shape), draw_inputs("correlated", shape[1])
    uw, sw, vwt = np.linalg.svd(weight, full_matrices=False)
    ux, sx, _ = np.linalg.svd(x.T, full_matrices=False)
    middle = best(sw[:, None] * vwt @ (ux * sx), 9)
    found = factorize(weight, 9, METHODS["drone"].loss(Statistics(moment=x.T @ x)))
    np.testing.assert_allclose(product(found), uw @ (middle / sx) @ ux.T, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("rank", [1, 9, 15])
def test_outputs_lose_just_the_discarded_singular_values(shape: tuple[int, int], kind: str, rank: int) -> None:
    """The root of the second moment is not asked for: W X^T has the same singular values."""
    weight, x = draw_weight(*shape), draw_inputs(kind, shape[1])
    found = factorize(weight, rank, Loss(inputs=x.T @ x))
    energies = np.linalg.svd(weight @ x.T, compute_uv=False) ** 2
    lost = ((weight - product(found)) @ x.T) ** 2
    np.testing.assert_allclose(lost.sum(), energies[rank:].sum(), rtol=1e-6, atol=1e-9 * energies.sum())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", INPUTS)
def test_gains_are_the_squared_singular_values(shape: tuple[int, int], kind: str) -> None:
    weight, x = draw_weight(*shape), draw_inputs(kind, shape[1])
    fisher = np.random.default_rng(2).uniform(0.1, 1, shape[0])
    found = gains(weight, Loss(fisher, x.T @ x))
    expected = np.zeros(min(shape))
    singular = np.linalg.svd(np.sqrt(fisher)[:, None] * weight @ x.T, compute_uv=False)[: len(expected)]
    expected[: len(singular)] = singular**2
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9 * expected.sum())


@pytest.mark.parametrize("kind", INPUTS)
def test_the_whole_rank_gives_the_weight_back(kind: str) -> None:
    """In directions that no input has, too: another text may have them."""
    weight, x = draw_weight(24, 40), draw_inputs(kind, 40)
    np.testing.assert_allclose(product(factorize(weight, 24, Loss(inputs=x.T @ x))), weight, atol=1e-9)


def test_rank_that_inputs_do_not_need_goes_to_the_rest_of_the_weight() -> None:
    weight, x = draw_weight(40, 40), draw_inputs("few", 40)
    basis = np.linalg.qr(weight @ x.T)[0]
    rest = weight - basis @ basis.T @ weight
    found = weight - product(factorize(weight, 30, Loss(inputs=x.T @ x)))
    assert np.linalg.norm(found) < 1.3 * np.linalg.norm(rest - best(rest, 20))
    assert np.abs(found @ x.T).max() < 1e-5 * np.abs(weight @ x.T).max()


@pytest.mark.parametrize("loss", [Loss(np.zeros(24)), Loss(inputs=np.zeros(40)), Loss(inputs=np.zeros((40, 40)))])
def test_statistics_that_say_nothing_leave_plain_svd(loss: Loss) -> None:
    weight = draw_weight(24, 40)
    np.testing.assert_allclose(product(factorize(weight, 9, loss)), best(weight, 9), atol=1e-10)


def test_extreme_statistics_give_finite_factors() -> None:
    weight = draw_weight(24, 40)
    weight[5] = 0
    rows, inputs = 10.0 ** np.linspace(-30, 30, 24), np.diag(10.0 ** np.linspace(30, -30, 40))
    rows[3] = 0
    for rank in (1, 9, 24):
        found = factorize(weight, rank, Loss(rows, inputs))
        assert all(np.isfinite(factor).all() for factor in found)
    assert all(np.isfinite(factor).all() for factor in factorize(np.zeros((24, 40)), 3, Loss(rows, inputs)))


def test_both_factors_have_the_same_size() -> None:
    weight, x = draw_weight(24, 40), draw_inputs("outliers", 40)
    up, down = factorize(weight, 9, Loss(inputs=x.T @ x))
    np.testing.assert_allclose(np.linalg.norm(up, axis=0), np.linalg.norm(down, axis=1))


def test_a_missing_statistic_is_named() -> None:
    with pytest.raises(RequestError, match="method asvd needs the magnitude"):
        METHODS["asvd"].loss(Statistics(moment=np.eye(3)))
    with pytest.raises(RequestError, match="no method named 'cur'; known: svd, fwsvd, asvd, drone, svdllm"):
        method_named("cur")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("rank", [1, 9, 15])
def test_an_update_is_least_squares_for_the_other_inputs(shape: tuple[int, int], kind: str, rank: int) -> None:
    """SVD-LLM's update of U, as numpy solves it: outputs of the weight from latent inputs."""
    weight, x = draw_weight(*shape), draw_inputs("correlated", shape[1])
    other = draw_inputs(kind, shape[1])[::-1] * np.linspace(0.5, 2, shape[1])
    before = factorize(weight, rank, Loss(inputs=x.T @ x))
    found = refit(weight, before, other.T @ other)
    expected = np.linalg.lstsq(other @ before.down.T, other @ weight.T)[0].T
    errors = [np.linalg.norm(other @ (weight - up @ before.down).T) for up in (found.up, expected, before.up)]
    scale = np.linalg.norm(other @ weight.T)
    assert errors[0] <= errors[1] + 1e-6 * scale
    assert errors[0] <= errors[2] + 1e-9 * scale
    assert found.down is not before.up and np.array_equal(found.down, before.down)


def test_an_update_for_the_same_inputs_changes_nothing() -> None:
    weight, x = draw_weight(24, 40), draw_inputs("correlated", 40)
    before = factorize(weight, 9, Loss(inputs=x.T @ x))
    np.testing.assert_allclose(refit(weight, before, x.T @ x).up, before.up, atol=1e-9)


def test_an_update_leaves_open_what_no_input_reaches() -> None:
    weight, x = draw_weight(24, 40), draw_inputs("correlated", 40)
    before = factorize(weight, 9, Loss(inputs=x.T @ x))
    np.testing.assert_array_equal(refit(weight, before, np.zeros((40, 40))).up, before.up)
