"""Factors near the dense model's outputs, against what SAES-SVD (Hu et al. 2026) writes down, and on singular statistics."""

import numpy as np
import pytest
from truncation import best, draw_inputs, draw_weight

from flashsvd_jax.compress.alignment import STRENGTHS, AlignedLoss, _least_share
from flashsvd_jax.compress.factors import Factors, Loss, factorize
from flashsvd_jax.compress.heads import factorize_groups
from flashsvd_jax.compress.methods import METHODS, Statistics

SHAPES = [(24, 40), (40, 24), (32, 32)]
INPUTS = ["correlated", "near-singular", "singular", "few", "outliers", "dead"]


def originals(x: np.ndarray, size: float = 0.3) -> np.ndarray:
    """What inputs would have been in the dense model: near them, in directions of their own too."""
    rng = np.random.default_rng(11)
    return x @ (np.eye(x.shape[1]) + size * rng.normal(size=(x.shape[1],) * 2) / np.sqrt(x.shape[1])) + (
        size * x.std(0) * rng.normal(size=x.shape)
    )


def statistics(x: np.ndarray, x0: np.ndarray) -> Statistics:
    return Statistics(moment=x.T @ x, shift=(x0 - x).T @ x)


def reached(x: np.ndarray) -> np.ndarray:
    """An orthonormal basis [tokens, n] of what linear functions of the inputs give, rounding errors left out."""
    u, s, _ = np.linalg.svd(x / np.maximum(np.linalg.norm(x, axis=0), 1e-300), full_matrices=False)
    return u[:, s > 1e-6 * s.max()]


def product(factors: Factors) -> np.ndarray:
    return factors.up @ factors.down


def published(weight: np.ndarray, x: np.ndarray, x0: np.ndarray, rank: int, strength: float) -> np.ndarray:
    """Equations 9 to 12: G = W (H + b D) H^-1/2, its truncation, and back by H^-1/2."""
    h, d = x.T @ x, (x0 - x).T @ x
    values, vectors = np.linalg.eigh(h)
    whitening = (vectors / np.sqrt(values)) @ vectors.T
    return best(weight @ (h + strength * d) @ whitening, rank) @ whitening


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("strength", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("rank", [1, 9])
def test_factors_are_those_of_the_closed_form(shape: tuple[int, int], strength: float, rank: int) -> None:
    weight, x = draw_weight(*shape), draw_inputs("correlated", shape[1])
    loss = AlignedLoss(inputs=x.T @ x, shift=(originals(x) - x).T @ x, strength=strength)
    expected = published(weight, x, originals(x), rank, strength)
    found = product(factorize(weight, rank, loss))
    assert np.linalg.norm((found - expected) @ x.T) < 5e-3 * np.linalg.norm(expected @ x.T)
    x = np.random.default_rng(5).normal(size=x.shape)  # no direction so weak that what keeps inverses finite shows
    loss = AlignedLoss(inputs=x.T @ x, shift=(originals(x) - x).T @ x, strength=strength)
    expected = published(weight, x, originals(x), rank, strength)
    np.testing.assert_allclose(product(factorize(weight, rank, loss)), expected, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("rank", [1, 9, 15])
def test_no_factors_come_nearer_to_the_dense_models_outputs(shape: tuple[int, int], kind: str, rank: int) -> None:
    """AA-SVD's objective. What is left: the outputs that no function of these inputs gives, and discarded singular values of the
    others. A pseudoinverse by numpy's SVD of the inputs themselves, no second moment."""
    weight, x = draw_weight(*shape), draw_inputs(kind, shape[1])
    x0 = originals(x)
    loss = METHODS["aa_svd"].loss(statistics(x, x0))
    basis = reached(x)
    nearest = basis @ (basis.T @ (x0 @ weight.T))
    energies = np.linalg.svd(nearest, compute_uv=False) ** 2
    least = np.square(x0 @ weight.T - nearest).sum() + energies[rank:].sum()
    found = product(factorize(weight, rank, loss))
    assert np.isfinite(found).all()
    # Some inputs there are weak beside what is added to eigenvalues; what chance has them say of strong ones is not learned.
    tolerance = 1e-2 if kind in ("near-singular", "outliers") else 1e-4
    assert np.square(x @ found.T - x0 @ weight.T).sum() <= least + tolerance * energies.sum()


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("method", ["saes", "aa_svd"])
def test_inputs_that_did_not_change_leave_svdllm(kind: str, method: str) -> None:
    weight, x = draw_weight(24, 40), draw_inputs(kind, 40)
    plain = product(factorize(weight, 9, METHODS["svdllm"].loss(Statistics(moment=x.T @ x))))
    np.testing.assert_allclose(product(factorize(weight, 9, METHODS[method].loss(statistics(x, x)))), plain, atol=1e-9)
    nothing = Statistics(moment=np.zeros((40, 40)), shift=np.zeros((40, 40)))
    np.testing.assert_allclose(product(factorize(weight, 9, METHODS[method].loss(nothing))), best(weight, 9), atol=1e-9)


def test_where_no_input_reaches_the_weight_stays() -> None:
    weight, x = draw_weight(40, 40), draw_inputs("dead", 40)
    target = METHODS["aa_svd"].loss(statistics(x, originals(x))).target(weight, 9)
    np.testing.assert_allclose(np.asarray(target)[:, ::3], weight[:, ::3], atol=1e-6)
    assert np.abs(np.asarray(target) - weight).max() > 0.05


@pytest.mark.parametrize("kind", ["few", "singular"])
def test_rounding_errors_of_statistics_in_float32_are_not_learned(kind: str) -> None:
    weight, x = draw_weight(40, 40), draw_inputs(kind, 40)
    x0, single = originals(x), x.astype(np.float32)
    rounded = Statistics(moment=single.T @ single, shift=(x0.astype(np.float32) - single).T @ single)
    exact, found = (np.asarray(METHODS["aa_svd"].loss(s).target(weight, 9)) for s in (statistics(x, x0), rounded))
    assert np.linalg.norm(found - exact) < 0.5 * np.linalg.norm(exact)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["correlated", "singular", "few", "dead"])
@pytest.mark.parametrize("rank", [1, 9, 15])
def test_the_strength_is_that_of_the_fixed_subspace(shape: tuple[int, int], kind: str, rank: int) -> None:
    """Equations 13 to 19 with numpy's SVD, and the least of the ratio on a grid in place of the roots of its derivative."""
    weight, x = draw_weight(*shape), draw_inputs(kind, shape[1])
    x0 = originals(x, 0.6)
    loss = METHODS["saes"].loss(statistics(x, x0))
    basis = reached(x)
    whole, moved = weight @ x.T @ basis, weight @ (x0 - x).T @ basis  # W H^1/2 and W D H^-1/2, but for a rotation
    left, _, right = np.linalg.svd(whole, full_matrices=False)
    p, q = np.eye(shape[0]) - left[:, :rank] @ left[:, :rank].T, np.eye(whole.shape[1]) - right[:rank].T @ right[:rank]
    grid = np.linspace(*STRENGTHS, 2001)
    lost = [np.linalg.norm(p @ (whole + b * moved) @ q) / np.linalg.norm(whole + b * moved) for b in grid]
    expected = grid[int(np.argmin(lost))] if max(lost) > 1e-6 else STRENGTHS[0]
    assert isinstance(loss, AlignedLoss)
    base, aligned = (
        weight,
        np.asarray(AlignedLoss(inputs=loss.inputs, shift=loss.shift, strength=1.0).target(weight, rank)),
    )
    found = np.asarray(loss.target(weight, rank))
    chosen = float(((found - base) * (aligned - base)).sum() / np.square(aligned - base).sum())
    at = float(np.interp(chosen, grid, lost))
    assert at <= min(lost) + 1e-4
    assert chosen == pytest.approx(expected, abs=0.02) or abs(at - min(lost)) < 1e-5


def test_the_least_share_is_found_at_turns_ends_and_where_there_is_none() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for low, high in [(0.0, 1.0), (0.2, 0.5)] * 25:
        grid = np.linspace(low, high, 100_001)
        s, d, keep = rng.normal(size=8), 2 * rng.normal(size=8), rng.uniform(size=8) < 0.5
        tail = [float((one * other)[keep].sum()) for one, other in ((s, s), (s, d), (d, d))]
        full = [float((one * other).sum()) for one, other in ((s, s), (s, d), (d, d))]
        values = (tail[0] + 2 * tail[1] * grid + tail[2] * grid**2) / (full[0] + 2 * full[1] * grid + full[2] * grid**2)
        found = _least_share(tail, full, low, high)
        inside += low < found < high
        assert np.interp(found, grid, values) == pytest.approx(values.min(), abs=1e-6)
    assert inside > 5
    for bounds in ((0.0, 1.0), (0.2, 0.5)):
        assert _least_share([0.0] * 3, [1.0, 0.0, 1.0], *bounds) == bounds[0]
        assert _least_share([0.0] * 3, [0.0] * 3, *bounds) == bounds[0]


def test_heads_choose_strengths_of_their_own() -> None:
    weight, x = draw_weight(40, 24), draw_inputs("correlated", 24)
    loss = METHODS["saes"].loss(statistics(x, originals(x, 0.6)))
    up, down = factorize_groups(weight, 3, loss, 5)
    for head in range(5):
        alone = product(factorize(weight[8 * head : 8 * head + 8], 3, loss))
        np.testing.assert_allclose(up[head] @ down[3 * head : 3 * head + 3], alone, atol=1e-9)


def test_a_pass_over_the_dense_model_has_the_plain_loss() -> None:
    """By which ranks are chosen."""
    x = draw_inputs("correlated", 24)
    assert type(METHODS["saes"].loss(Statistics(moment=x.T @ x))) is Loss
