"""Projections of one input against float64 products: every mixture of members, padding, sharing, and the class itself."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import PackedProjection, Projection, assume_target, hardware_rank, pack, project
from pallas_kernels.jax_triton.implementation import refuses as refuses_matrix_vector
from pallas_kernels.products import _matrix_product, _row_reduction
from pallas_kernels.target import H200

D_IN = 13
# (d_out, rank or None for dense, has a bias, groups where there are several)
MIXTURES: dict[str, list[Any]] = {
    "dense": [(7, None, False)],
    "dense_bias": [(7, None, True)],
    "low_rank": [(9, 3, False)],
    "low_rank_bias": [(9, 3, True)],
    "rank_above_width": [(5, 17, True)],
    "rank_one": [(5, 1, False)],
    "all_low_rank": [(11, 5, False), (3, 2, True), (3, 7, False)],
    "all_dense": [(11, None, True), (3, None, False), (5, None, True)],
    "heads": [(12, 2, True, 4), (6, 3, False, 2), (5, 1, True, 5)],
    "heads_mixed": [(12, 2, True, 3), (7, 5, True), (3, None, False)],
    "mixed": [(11, None, False), (3, 5, True), (5, None, True), (9, 1, False)],
}


def up_to(multiple: int) -> Callable[[int], int]:
    return lambda rank: -(-rank // multiple) * multiple


def draw(
    d_out: int, rank: int | None, has_bias: bool, groups: int = 1, seed: int = 0, dtype: Any = np.float32
) -> Projection:
    rng = np.random.default_rng([seed, d_out])
    array = lambda *shape: rng.standard_normal(shape).astype(dtype)  # noqa: E731
    bias = array(d_out) if has_bias else None
    if rank is None:
        return Projection(weight=array(d_out, D_IN), bias=bias)
    up = array(d_out, rank) if groups == 1 else array(groups, d_out // groups, rank)
    return Projection(down=array(groups * rank, D_IN), up=up, bias=bias)


def product(p: Projection) -> np.ndarray:
    """The weight [d_out, d_in] of two factors in float64; groups one by one."""
    down, up = (np.asarray(a, np.float64) for a in (p.down, p.up))
    if up.ndim == 2:
        return up @ down
    rank = up.shape[2]
    return np.concatenate([block @ down[g * rank : (g + 1) * rank] for g, block in enumerate(up)])


def exact(x: np.ndarray, p: Projection) -> np.ndarray:
    wide = lambda a: np.asarray(a, np.float64)  # noqa: E731
    y = wide(x) @ (wide(p.weight) if p.weight is not None else product(p)).T
    return y if p.bias is None else y + wide(p.bias)


@pytest.fixture(params=MIXTURES)
def members(request: pytest.FixtureRequest) -> list[Projection]:
    return [draw(*member, seed=i) for i, member in enumerate(MIXTURES[request.param])]


@pytest.mark.parametrize(("shape", "multiple"), [((D_IN,), 1), ((1, 1, D_IN), 1), ((2, 3, D_IN), 8)])
def test_project_is_each_members_product(members: list[Projection], shape: tuple[int, ...], multiple: int) -> None:
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    outputs = jax.jit(project)(x, pack(members, up_to(multiple)))
    assert len(outputs) == len(members)
    for got, member in zip(outputs, members, strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, exact(x, member), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("members", ["mixed", "heads_mixed"], indirect=True)
def test_bfloat16_is_added_up_in_float32_and_only_latents_and_outputs_are_rounded(members: list[Projection]) -> None:
    members = jax.tree.map(lambda a: a.astype(jnp.bfloat16), members)
    x = np.random.default_rng(1).standard_normal((4, D_IN)).astype(jnp.bfloat16)
    wide, rounded = project(x, pack(members), dtype=jnp.float32), project(x, pack(members))
    for member, unrounded, output in zip(members, wide, rounded, strict=True):
        assert (unrounded.dtype, output.dtype) == (jnp.float32, jnp.bfloat16)
        if member.down is None:
            want = exact(x, member)
        else:
            latent = exact(x, Projection(weight=member.down)).astype(jnp.bfloat16)
            eye = np.eye(member.down.shape[0], dtype=np.float32)
            want = exact(latent, Projection(down=eye, up=member.up, bias=member.bias))
        np.testing.assert_allclose(unrounded, want, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(output.astype(jnp.float32), want, rtol=2**-8, atol=1e-5)  # half a unit of its 8 bits


@pytest.mark.parametrize("shape", [(D_IN,), (1, D_IN), (1, 1, D_IN)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_a_gpu_computes_for_a_single_row_is_the_same_product(shape: tuple[int, ...], dtype: Any) -> None:
    rng = np.random.default_rng(0)
    x, weight = (jnp.asarray(rng.standard_normal(s).astype(dtype)) for s in (shape, (7, D_IN)))
    got, want = _row_reduction(x, weight), _matrix_product(x, weight)
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 15, 16, 17, 100, 122, 123, 128, 129, 1000, 1024, 1638, 2730])
def test_hardware_rank_adds_little_and_fills_sectors(rank: int) -> None:
    padded = hardware_rank(rank)
    assert padded % 16 == 0
    assert rank <= padded <= max(rank + 15, 1.05 * rank)
    assert padded % 128 == 0 or up_to(128)(rank) > 1.05 * rank


@pytest.mark.parametrize(("multiple", "width"), [(1, 5), (4, 8), (5, 5), (16, 16)])
def test_padding_is_zero_on_both_factors(multiple: int, width: int) -> None:
    member = draw(9, 5, True)
    packed = pack([member], up_to(multiple))
    (up,) = packed.ups
    assert up is not None
    assert (packed.first.shape, up.shape, packed.widths, packed.d_outs) == ((width, D_IN), (9, width), (width,), (9,))
    np.testing.assert_array_equal(packed.first[:5], member.down)
    np.testing.assert_array_equal(up[:, :5], member.up)
    assert not packed.first[5:].any() and not up[:, 5:].any()


@pytest.mark.parametrize(("multiple", "width"), [(1, 5), (4, 8), (16, 16)])
def test_each_group_is_padded_by_itself(multiple: int, width: int) -> None:
    member = draw(9, 5, True, 3)
    packed = pack([member], up_to(multiple))
    (up,) = packed.ups
    assert up is not None and member.down is not None
    assert (packed.first.shape, up.shape) == ((3 * width, D_IN), (3, 3, width))
    assert (packed.widths, packed.d_outs) == ((3 * width,), (9,))
    first = np.asarray(packed.first).reshape(3, width, D_IN)
    np.testing.assert_array_equal(first[:, :5], np.reshape(member.down, (3, 5, D_IN)))
    np.testing.assert_array_equal(up[..., :5], member.up)
    assert not first[:, 5:].any() and not up[..., 5:].any()


def test_factors_of_heads_are_served_by_xla_alone() -> None:
    packed = pack([Projection(down=jnp.zeros((24, 16)), up=jnp.zeros((3, 8, 8)))])
    for rows, served in ((1, "xla_rows"), (3, "xla")):
        x = jnp.zeros((rows, 16))
        with assume_target(H200):
            chosen, refusals = project.choose(x, packed)
        assert chosen.name == served
        assert "block-diagonal" in refusals["triton"]
        assert "block-diagonal" in str(refuses_matrix_vector(x, packed))


def test_dense_members_are_not_padded_and_keep_their_place_between_padded_ones() -> None:
    packed = pack([draw(3, 5, False), draw(7, None, False, seed=1), draw(9, 2, False, seed=2)], up_to(4))
    assert packed.widths == (8, 7, 4)
    assert packed.starts == (0, 8, 15)
    assert packed.first.shape == (19, D_IN)
    assert packed.d_outs == (3, 7, 9)


def test_members_that_share_a_down_factor_hold_it_once() -> None:
    first, other = draw(7, 3, True), draw(9, 5, False, seed=1)
    sharing = Projection(down=first.down, up=draw(11, 3, False, seed=2).up)
    packed = pack([first, other, sharing], up_to(4))
    assert packed.first.shape == (4 + 8, D_IN)
    assert packed.starts == (0, 4, 0)
    x = np.random.default_rng(1).standard_normal((2, D_IN)).astype(np.float32)
    for got, member in zip(project(x, packed), (first, other, sharing), strict=True):
        np.testing.assert_allclose(got, exact(x, member), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("multiple", [1, 4])
def test_numpy_stays_with_numpy_and_jax_with_jax(multiple: int) -> None:
    members = [draw(*member, seed=i) for i, member in enumerate(MIXTURES["mixed"])]
    with_numpy = jax.tree.leaves(pack(members, up_to(multiple)))
    with_jax = jax.tree.leaves(pack(jax.device_put(members), up_to(multiple)))
    assert {type(leaf) for leaf in with_numpy} == {np.ndarray}
    assert all(isinstance(leaf, jax.Array) for leaf in with_jax)
    for got, want in zip(with_jax, with_numpy, strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_packed_projection_is_a_pytree_whose_layout_is_static(members: list[Projection]) -> None:
    packed = pack(members, up_to(4))
    leaves, structure = jax.tree.flatten(packed)
    again = jax.tree.unflatten(structure, leaves)
    assert isinstance(again, PackedProjection)
    assert (again.widths, again.starts, again.d_outs) == (packed.widths, packed.starts, packed.d_outs)


@pytest.mark.parametrize(("rank", "low_rank"), [(None, False), (3, True)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_projection_describes_the_weight_it_stands_for(rank: int | None, low_rank: bool, has_bias: bool) -> None:
    p = draw(7, rank, has_bias)
    assert (p.shape, p.ndim, p.rank, p.is_low_rank, p.dtype) == ((7, D_IN), 2, rank, low_rank, np.float32)
    held = 7 * D_IN if rank is None else rank * (7 + D_IN)
    assert p.nbytes == 4 * (held + 7 * has_bias)
    assert len(jax.tree.leaves(p)) == (2 if low_rank else 1) + has_bias
    np.testing.assert_array_equal(jax.tree.leaves(p)[0], p.down if low_rank else p.weight)


@pytest.mark.parametrize(("d_out", "rank", "groups"), [(7, None, 1), (7, 3, 1), (8, 3, 4)])
def test_projection_stands_where_an_array_can(d_out: int, rank: int | None, groups: int) -> None:
    p = jax.device_put(draw(d_out, rank, True, groups))
    assert (p.shape, p.rank) == ((d_out, D_IN), rank)
    weight = np.asarray(p.weight) if rank is None else product(p)
    x = np.random.default_rng(1).standard_normal((2, D_IN)).astype(np.float32)
    close = {"rtol": 1e-5, "atol": 1e-5}
    np.testing.assert_allclose(jnp.asarray(p), weight, **close)
    np.testing.assert_allclose(jnp.einsum("bi,oi->bo", x, p), x @ weight.T, **close)
    np.testing.assert_allclose(jax.jit(lambda p: jnp.matmul(p, x.T))(p), weight @ x.T, **close)
    assert jax.eval_shape(lambda p: p, p).shape == (d_out, D_IN)


def test_low_rank_weight_has_the_factors_dtype() -> None:
    p = draw(7, 3, False, dtype=jnp.bfloat16)
    assert p.dtype == jnp.asarray(p).dtype == jnp.bfloat16


@pytest.mark.parametrize("separate_from", [1, 10**9])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_products_that_are_rounded_at_once(mixture: str, separate_from: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pallas_kernels.products.SEPARATE_ROWS", separate_from)
    members = [draw(*member, seed=i, dtype=jnp.bfloat16) for i, member in enumerate(MIXTURES[mixture])]
    members.append(
        Projection(down=members[0].down, up=members[0].up, weight=members[0].weight)
    )  # shares its first factor
    x = jnp.asarray(np.random.default_rng(1).standard_normal((5, D_IN)), jnp.bfloat16)
    with assume_target(H200):
        outputs = jax.jit(lambda x, p: project(x, p, implementation="xla_rounded"))(x, pack(members))
    for got, member in zip(outputs, members, strict=True):
        want = exact(np.asarray(x, np.float32), member)
        assert got.dtype == jnp.bfloat16
        assert np.linalg.norm(np.asarray(got, np.float64) - want) <= 1e-2 * np.linalg.norm(want)


def test_rounded_products_are_for_half_precision_alone() -> None:
    packed = pack([draw(7, 3, True)])
    with assume_target(H200):
        for x, options in ((jnp.zeros((5, D_IN)), {}), (jnp.zeros((5, D_IN), jnp.bfloat16), {"dtype": jnp.float32})):
            _, refusals = project.choose(x, packed, **options)
            assert "float32" in refusals["xla_rounded"]
