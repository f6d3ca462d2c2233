"""Published shapes with fewer layers."""

import dataclasses
from typing import Any

from flashsvd_jax.config import ModelConfig
from flashsvd_jax.factorization import Factorization


def first_layers(config: ModelConfig, count: int, dense: tuple[str, ...] = (), **fields: Any) -> ModelConfig:
    """A model's first layers alone; sites whose names begin with one of ``dense`` are not factorized. ``fields`` change others."""
    ranks = {
        site: rank
        for site, rank in config.factorization.rank_by_site.items()
        if int(site.split(".")[0].removeprefix("layers_")) < count and not site.startswith(dense)
    }
    cut = {"num_layers": count, "windows": config.windows[:count], "factorization": Factorization.of(ranks)}
    return dataclasses.replace(config, **cut, **fields)
