"""Factors of single heads, as FlashSVD has them for queries, keys and values: each head's rows of a weight are one by themselves.

All heads of a projection have one rank. Their second factors form a block-diagonal one, [heads, head_dim, rank], and their first
ones lie behind each other, [heads * rank, d_in]. What is one group throughout is a weight as a whole, with plain factors.
"""

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np

from flashsvd_jax.any_config import AnyConfig
from flashsvd_jax.compress.factors import Factors, Loss, factorize, gains, refit
from flashsvd_jax.compress.float64 import Array
from flashsvd_jax.param_specs import Site
from flashsvd_jax.shapes import layer_sites
from pallas_kernels.projection import by_group

HEADS = ("own", "whole")
_MADE_OF_HEADS = ("q_proj", "k_proj", "v_proj", "qkv_proj")


def head_groups(config: AnyConfig, heads: str | None) -> dict[str, int]:
    """How many heads each site is made of, where they have factors of their own: with "own" those of queries, keys and values."""
    if heads != "own":
        return {}
    return {site.name: site.d_out // config.head_dim for site in layer_sites(config) if is_made_of_heads(site.name)}


def is_made_of_heads(site: str) -> bool:
    """Whether a site gives queries, keys or values."""
    return site.rpartition(".")[2] in _MADE_OF_HEADS


def ranked_parts(sites: Iterable[Site], groups: Mapping[str, int]) -> list[Site]:
    """What ranks are ranks of, by the names of the sites: one group of each, all of it for most."""
    return [dataclasses.replace(site, d_out=site.d_out // groups.get(site.name, 1)) for site in sites]


def factorize_groups(weight: np.ndarray, rank: int, loss: Loss, groups: int) -> Factors:
    """`factorize` of each group of rows; the up factor is [groups, d_out / groups, rank] where there are several."""
    if groups == 1:
        return factorize(weight, rank, loss)
    parts = zip(np.split(weight, groups), _losses(loss, groups), strict=True)
    return _joined([factorize(part, rank, of_part) for part, of_part in parts])


def refit_groups(weight: np.ndarray, factors: Factors, moment: Array) -> Factors:
    """`refit` of each group, for factors as `factorize_groups` gives them."""
    if factors.up.ndim == 2:
        return refit(weight, factors, moment)
    pairs = zip(factors.up, by_group(factors.down, factors.up), strict=True)
    parts = zip(np.split(weight, len(factors.up)), pairs, strict=True)
    return _joined([refit(part, Factors(*pair), moment) for part, pair in parts])


def gains_of_groups(weight: np.ndarray, loss: Loss, groups: int) -> np.ndarray:
    """What each further rank of all groups takes off the loss, the most first, [smaller side of a group]."""
    parts = zip(np.split(weight, groups), _losses(loss, groups), strict=True)
    return np.sum([gains(part, of_part) for part, of_part in parts], axis=0)


def multiplied(up: np.ndarray, down: np.ndarray) -> np.ndarray:
    """The weight [d_out, d_in] that factors stand for, float32."""
    up, down = up.astype(np.float32), down.astype(np.float32)
    return np.matmul(up, by_group(down, up)).reshape(-1, down.shape[1])


def _losses(loss: Loss, groups: int) -> list[Loss]:
    """The loss of each group; it is one object where rows count alike, because it keeps the root of its inputs' moment."""
    if loss.rows is None:
        return [loss] * groups
    return [Loss(rows, loss.inputs) for rows in np.split(loss.rows, groups)]


def _joined(parts: list[Factors]) -> Factors:
    return Factors(np.stack([part.up for part in parts]), np.concatenate([part.down for part in parts]))
