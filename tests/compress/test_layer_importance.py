"""AdaSVD's ranks against the equations of its paper (Li et al. 2025), its importances against PyTorch's, and its alternation."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from truncation import draw_inputs, draw_weight

from flashsvd_jax import bundled
from flashsvd_jax.checkpoint import open_folder
from flashsvd_jax.compress import Calibration, Recipe
from flashsvd_jax.compress.budget import Budget
from flashsvd_jax.compress.dense_layers import DenseLayers
from flashsvd_jax.compress.factors import Loss, factorize
from flashsvd_jax.compress.layer_importance import MARGIN, importance_ranks
from flashsvd_jax.param_specs import Site
from flashsvd_jax.tokenizer import Tokenizer

CALIBRATION = Calibration(bundled.CALIBRATION.read_text(encoding="utf-8")[:5000], "text.txt", 4, 48, 1)
SITES = [
    Site(f"layers_{i}.{name}", *shape, "heads", "embed", False)
    for i in range(4)
    for name, shape in (("q_proj", (400, 400)), ("up_proj", (640, 400)))
]


def numbers(site: Site, rank: int | None) -> int:
    return site.d_out * site.d_in if rank is None else rank * (site.d_out + site.d_in)


def budget(ratio: float) -> Budget:
    return Budget(ratio * sum(s.d_out * s.d_in for s in SITES), numbers)


def of_layers(*values: float) -> dict[str, float]:
    return {s.name: values[int(s.name[7])] for s in SITES}


@pytest.mark.parametrize("ratio", [0.05, 0.4, 0.6, 0.8])
def test_ratios_are_those_of_the_papers_equations(ratio: float) -> None:
    values = np.array([0.9, 0.5, 0.2, 0.7])
    found = importance_ranks(SITES, ratio, of_layers(*values), budget(ratio))
    least = max(ratio - MARGIN, 0)
    for s in SITES:
        kept = least + values[int(s.name[7])] / values.mean() * (ratio - least)  # equations 19 and 20
        assert found[s.name] == max(1, int(kept * s.d_out * s.d_in / (s.d_out + s.d_in)))
    assert sum(numbers(s, found[s.name]) for s in SITES) <= ratio * sum(s.d_out * s.d_in for s in SITES)


def test_what_a_layer_cannot_hold_goes_to_the_others() -> None:
    found = importance_ranks(SITES, 0.9, of_layers(0.9, 0.1, 0.1, 0.1), budget(0.9))
    assert [found[f"layers_{i}.q_proj"] for i in range(4)] == [200, *[int((0.8 + 0.2 / 3) * 200)] * 3]
    assert sum(numbers(s, found[s.name]) for s in SITES) > 0.89 * sum(s.d_out * s.d_in for s in SITES)


@pytest.mark.parametrize("values", [(-0.5, 0.4, 0.4, 0.4), (0.0, 0.0, 0.0, 0.0), (-1.0, -1.0, -1.0, -1.0)])
def test_similarities_of_nothing_in_common_count_as_none(values: tuple[float, ...]) -> None:
    found = importance_ranks(SITES, 0.5, of_layers(*values), budget(0.5))
    assert sum(numbers(s, found[s.name]) for s in SITES) <= 0.5 * sum(s.d_out * s.d_in for s in SITES)
    assert found["layers_0.q_proj"] == (100 if max(values) <= 0 else 80)


def test_importances_are_cosines_of_pytorchs_hidden_states(dense: Any) -> None:
    """Those of layers that share a basis are the mean."""
    tokens = torch.tensor(CALIBRATION.windows(Tokenizer(dense.folder), dense.config)).long()
    streams: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _, given, made: streams.extend((given[0], made[0] if isinstance(made, tuple) else made)))
        for layer in dense.reference.model.model.layers
    ]  # fmt: skip
    with torch.no_grad():
        dense.reference.model(tokens)
    for hook in hooks:
        hook.remove()
    expected = [float(torch.cosine_similarity(*streams[2 * i : 2 * i + 2], dim=-1).mean()) for i in range(2)]
    for method, shared in (("drone", False), ("basis_sharing", True)):
        recipe = Recipe(method, 0.5, "importance")
        with open_folder(dense.folder) as folder:
            layers = DenseLayers(folder, folder.config, recipe.settled(folder.config), CALIBRATION, False)
            found = layers.similarities()
        first = np.mean(expected) if shared else expected[0]
        assert found["layers_0.self_attn.q_proj"] == pytest.approx(first, abs=1e-4)
        assert found["layers_1.mlp.down_proj"] == pytest.approx(expected[1], abs=1e-4)
    assert abs(expected[0] - expected[1]) > 1e-3


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
@pytest.mark.parametrize("kind", ["correlated", "singular", "few"])
def test_alternating_least_squares_end_where_the_closed_form_is(shape: tuple[int, int], kind: str) -> None:
    """adaComp (equations 8 to 16): from plain SVD, each factor in turn by the pseudoinverse of the other. Its loss falls to that of
    factors that `svdllm` has without iterating, and from those it goes nowhere."""
    weight, x, rank = draw_weight(*shape), draw_inputs(kind, shape[1]), 5
    outputs = x @ weight.T

    def alternated(up: np.ndarray, down: np.ndarray, times: int) -> tuple[np.ndarray, np.ndarray]:
        for _ in range(times):
            up = np.linalg.lstsq(x @ down.T, outputs)[0].T
            down = np.linalg.pinv(up) @ weight
        return up, down

    def lost(up: np.ndarray, down: np.ndarray) -> float:
        return float(np.square(x @ (up @ down).T - outputs).sum())

    closed = factorize(weight, rank, Loss(inputs=x.T @ x))
    u, s, vt = np.linalg.svd(weight, full_matrices=False)
    plain = u[:, :rank] * s[:rank], vt[:rank]
    losses = [lost(*alternated(*plain, times)) for times in (0, 1, 3, 10, 300)]
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in itertools.pairwise(losses))
    assert losses[1] > 1.01 * lost(*closed) and losses[0] > 1.2 * lost(*closed)
    assert losses[-1] == pytest.approx(lost(*closed), rel=1e-3)
    assert lost(*alternated(*closed, 10)) == pytest.approx(lost(*closed), rel=1e-6)
