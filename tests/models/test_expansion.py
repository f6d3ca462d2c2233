"""Low-rank sites that become dense weights: which, what they hold then, and that the model computes the same."""

import dataclasses
import gc
import weakref
from collections.abc import Callable, Collection, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_decoder import full
from hf_models import build_model, reference

from flashsvd_jax.config import ModelConfig
from flashsvd_jax.errors import RequestError
from flashsvd_jax.factorization import MATERIALIZE, Factorization
from flashsvd_jax.models.expansion import expanded_sets, expanded_sites, site_sets
from flashsvd_jax.models.weights import DecoderWeights, build_weights
from flashsvd_jax.schema import flatten, schema, sites
from pallas_kernels import hardware_rank

LAYERS = 3
Q, K, V = (f"layers_{{}}.self_attn.{name}_proj" for name in "qkv")
DOWN = "layers_{}.mlp.down_proj"
# Shapes: q 48x48, k and v 16x48, gate and up 52x48, down 48x52; break-even of q is rank 24, of k and v 12.
CASES: dict[str, tuple[dict[str, int], dict[str, str], dict[str, int]]] = {
    "alone": ({Q.format(0): 25, K.format(0): 3, DOWN.format(1): 24, DOWN.format(2): 40}, {}, {}),
    "heads": (
        {Q.format(0): 5, K.format(0): 3, V.format(0): 9, Q.format(1): 13, V.format(1): 2},
        {},
        {Q.format(0): 3, V.format(0): 2, Q.format(1): 3, V.format(1): 4},
    ),
    "in a group": (
        {Q.format(0): 30, K.format(0): 20, V.format(0): 20, DOWN.format(0): 5},
        {f"{V.format(0)}.down": f"{K.format(0)}.down"},
        {},
    ),
    "across layers": (
        {site.format(i): rank for i in (0, 1) for site, rank in ((Q, 20), (K, 40), (V, 40), (DOWN, 33))},
        {
            f"{Q.format(1)}.down": f"{Q.format(0)}.down",
            f"{DOWN.format(1)}.down": f"{DOWN.format(0)}.down",
            **{f"{site}.down": f"{K.format(0)}.down" for site in (V.format(0), K.format(1), V.format(1))},
        },
        {},
    ),
    "across layers in part": (  # q is shared, but each layer has a k of its own, so each holds a packed array of its own
        {site.format(i): rank for i in (0, 1) for site, rank in ((Q, 22), (K, 9))},
        {f"{Q.format(1)}.down": f"{Q.format(0)}.down"},
        {},
    ),
}  # fmt: skip


def up_to(multiple: int) -> Callable[[int], int]:
    return lambda rank: -(-rank // multiple) * multiple


def model(case: str) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """A Llama with a case's ranks, and random arrays of it by name; shared ones are one object."""
    ranks, shared, groups = CASES[case]
    dense = ModelConfig.from_hf(build_model("llama", num_hidden_layers=LAYERS).config.to_dict())
    config = dataclasses.replace(dense, factorization=Factorization.of(ranks, shared, groups))
    rng = np.random.default_rng(0)
    arrays = {
        name: (rng.standard_normal(spec.shape) * spec.shape[-1] ** -0.5).astype(np.float32)
        for name, spec in schema(config).items()
    }
    return config, arrays | {name: arrays[owner] for name, owner in shared.items()}


def held(weights: DecoderWeights) -> int:
    """Numbers in a model's arrays, those in several places counted once."""
    return sum({id(array): array.size for array in jax.tree.leaves(weights)}.values())


def build(
    config: ModelConfig, arrays: Mapping[str, np.ndarray], *, expand: Collection[str] = (), multiple: int = 1
) -> DecoderWeights:
    return build_weights(config, arrays.__getitem__, up_to(multiple), jax.device_put, expand)


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("case", CASES)
def test_a_set_counts_what_expanding_it_changes(case: str, multiple: int) -> None:
    config, arrays = model(case)
    sets = site_sets(config, up_to(multiple))
    assert sorted(name for found in sets for name in found.sites) == sorted(config.factorization.rank_by_site)
    before = held(build(config, arrays, multiple=multiple))
    for found in sets:
        after = held(build(config, arrays, expand=found.sites, multiple=multiple))
        assert after - before == found.dense - found.factors, found.sites


def test_sites_that_share_go_together() -> None:
    sets = {case: [found.sites for found in site_sets(model(case)[0], lambda rank: rank)] for case in CASES}
    assert sets["alone"] == [(Q.format(0),), (K.format(0),), (DOWN.format(1),), (DOWN.format(2),)]
    assert sets["in a group"] == [(Q.format(0),), (K.format(0), V.format(0)), (DOWN.format(0),)]
    attention = tuple(site.format(i) for i in (0, 1) for site in (Q, K, V))
    assert sets["across layers"] == [attention, (DOWN.format(0), DOWN.format(1))]
    assert sets["across layers in part"] == [(site.format(i),) for i in (0, 1) for site in (Q, K)]


@pytest.mark.parametrize(
    ("site", "rank", "groups", "multiple", "expected"),
    [
        (Q, 24, 1, 1, False),  # as many numbers as the weight
        (Q, 25, 1, 1, True),
        (Q, 17, 1, 16, True),  # padded to 32
        (Q, 16, 1, 16, False),
        (K, 12, 1, 1, False),
        (K, 13, 1, 1, True),
        (Q, 12, 3, 1, False),  # each group's own first factor counts
        (Q, 13, 3, 1, True),
        (Q, 9, 3, 16, True),
    ],
)
def test_auto_expands_what_holds_more_than_its_weight(
    site: str, rank: int, groups: int, multiple: int, expected: bool
) -> None:
    config, _ = model("alone")
    name = site.format(0)
    config = dataclasses.replace(config, factorization=Factorization.of({name: rank}, groups={name: groups}))
    assert expanded_sites(config, "auto", up_to(multiple)) == ({name} if expected else set())


def test_a_shared_factor_counts_once() -> None:
    """k and v at rank 14: apart 14 * (16 + 48) is more than 16 * 48 each; together 14 * (16 + 16 + 48) is less than twice that."""
    config, _ = model("alone")
    ranks = {K.format(0): 14, V.format(0): 14}
    apart = dataclasses.replace(config, factorization=Factorization.of(ranks))
    shared = Factorization.of(ranks, {f"{V.format(0)}.down": f"{K.format(0)}.down"})
    together = dataclasses.replace(config, factorization=shared)
    assert expanded_sites(apart, "auto", lambda rank: rank) == ranks.keys()
    assert not expanded_sites(together, "auto", lambda rank: rank)


def test_never_and_always() -> None:
    config, _ = model("across layers")
    assert expanded_sets(config, "never", hardware_rank) == []
    assert expanded_sites(config, "always", hardware_rank) == config.factorization.rank_by_site.keys()
    with pytest.raises(RequestError, match="materialize 'maybe' is not one of auto, never, always"):
        expanded_sets(config, "maybe", hardware_rank)


@pytest.mark.parametrize("case", ["alone", "heads", "in a group", "across layers in part"])
def test_no_packed_group_reads_more_than_its_dense_weights(case: str) -> None:
    config, arrays = model(case)
    expand = expanded_sites(config, "auto", hardware_rank)
    weights = build_weights(config, arrays.__getitem__, hardware_rank, expand=expand)
    numbers = {site.name: site.d_out * site.d_in for site in sites(config)}
    for index, layer in enumerate(weights.layers):
        dense = [sum(n for name, n in numbers.items() if name.startswith(f"layers_{index}.") and name.endswith(ends))
                 for ends in (("q_proj", "k_proj", "v_proj"), "o_proj", ("gate_proj", "up_proj"), "down_proj")]  # fmt: skip
        packed = [sum(a.size for a in jax.tree.leaves(g)) for g in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        assert all(got <= most for got, most in zip(packed, dense, strict=True)), (packed, dense)


@pytest.mark.parametrize("case", CASES)
def test_logits_do_not_depend_on_it(case: str) -> None:
    config, arrays = model(case)
    tokens = np.arange(18, dtype=np.int32).reshape(2, 9)
    want = full(config, build(config, arrays), tokens)
    choices = {choice: expanded_sites(config, choice, hardware_rank) for choice in MATERIALIZE}
    one_set_each = [frozenset(found.sites) for found in site_sets(config, hardware_rank)]
    for expand in {*choices.values(), *one_set_each}:
        got = full(config, build(config, arrays, expand=expand, multiple=8), tokens)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("architecture", ["llama_bias", "llama_tied"])
def test_logits_are_those_of_transformers_with_all_or_some_sites_expanded(architecture: str) -> None:
    pair = reference(architecture, factorized=True)
    tokens = np.arange(26, dtype=np.int32).reshape(2, 13)
    for choice in ("auto", "always"):
        expand = expanded_sites(pair.config, choice, hardware_rank)
        assert expand
        flat = flatten(pair.params)
        weights = build_weights(pair.config, flat.__getitem__, hardware_rank, jax.device_put, expand)
        np.testing.assert_allclose(full(pair.config, weights, tokens), pair.logits(tokens), rtol=0, atol=1e-4)


def test_everything_expanded_is_the_dense_model() -> None:
    pair = reference("llama_bias", factorized=True)
    flat, expand = flatten(pair.params), pair.config.factorization.rank_by_site.keys()
    weights = build_weights(pair.config, flat.__getitem__, hardware_rank, jax.device_put, expand)
    assert all(up is None for layer in weights.layers for up in (*layer.qkv.ups, *layer.gate_up.ups, *layer.down.ups))
    assert held(weights) == sum(spec.size for spec in schema(pair.config.dense()).values())


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize(
    ("stored", "dtype"), [("bfloat16", None), ("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "bfloat16")]
)
def test_the_product_is_rounded_once(stored: str, dtype: str | None, on_device: bool) -> None:
    """v is expanded, k stays dense and q low rank, so that all three kinds are packed together in another dtype."""
    config, arrays = model("alone")
    config = dataclasses.replace(config, factorization=Factorization.of({Q.format(0): 3, V.format(0): 5}))
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(s.shape).astype(stored) for name, s in schema(config).items()}
    given = jax.device_put(arrays) if on_device else arrays
    weights = build_weights(config, given.__getitem__, up_to(4), jax.device_put, {V.format(0)}, dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(weights)} == {jnp.dtype(dtype or stored)}
    packed = weights.layers[0].qkv
    assert (packed.widths, packed.first.shape) == ((4, 16, 16), (4 + 16 + 16, 48))
    got = np.asarray(packed.first[packed.starts[2] :], np.float64)
    up, down = (np.asarray(arrays[f"{V.format(0)}.{part}"], np.float64) for part in ("up", "down"))
    unit = jnp.finfo(jnp.dtype(dtype or stored)).eps / 2
    np.testing.assert_allclose(got, up @ down, rtol=1.001 * unit, atol=1e-6)


def test_a_bias_stays() -> None:
    pair = reference("llama_bias", factorized=True)
    flat, expand = flatten(pair.params), pair.config.factorization.rank_by_site.keys()
    packed = build_weights(pair.config, flat.__getitem__, expand=expand).layers[0].down
    np.testing.assert_array_equal(packed.biases[0], flat["layers_0.mlp.down_proj.bias"])


def test_one_group_is_in_memory_at_a_time() -> None:
    """Arrays that were read or made for earlier groups are gone when the next is read, but for what was placed."""
    config, _ = model("alone")
    config = dataclasses.replace(config, factorization=Factorization.of({s.name: 9 for s in sites(config)}))
    specs, alive, counts = schema(config), weakref.WeakSet(), []
    gc.collect()
    before = len(jax.live_arrays())

    class Array(np.ndarray):
        """Hashable, so that a WeakSet can count it."""

        __hash__ = object.__hash__  # type: ignore[assignment]

    def get(name: str) -> np.ndarray:
        counts.append((len(alive), len(jax.live_arrays()) - before))
        array = np.ones(specs[name].shape, np.float32).view(Array)
        alive.add(array)
        return array

    build_weights(config, get, hardware_rank, lambda array: None, config.factorization.rank_by_site.keys())
    assert max(host for host, _ in counts) <= 3 * 2  # factors of q, k and v
    assert max(device for _, device in counts) <= 2 * 3 + 1


def test_without_makes_sites_dense_and_finds_new_owners() -> None:
    factorization = model("across layers")[0].factorization
    assert factorization.without(()) == factorization
    assert (
        not factorization.without(factorization.rank_by_site)
        and not factorization.without(factorization.rank_by_site).shared
    )
    left = factorization.without({K.format(0), Q.format(1)})
    heads = model("heads")[0].factorization
    assert heads.without({Q.format(0)}).groups == tuple((site, n) for site, n in heads.groups if site != Q.format(0))
    assert left.rank_by_site.keys() == factorization.rank_by_site.keys() - {K.format(0), Q.format(1)}
    owner = f"{V.format(0)}.down"
    assert left.owner_by_name == {
        f"{K.format(1)}.down": owner,
        f"{V.format(1)}.down": owner,
        f"{DOWN.format(1)}.down": f"{DOWN.format(0)}.down",
    }
    specs = schema(dataclasses.replace(model("across layers")[0], factorization=left))
    assert {*left.owner_by_name, *left.owner_by_name.values()} <= specs.keys()
