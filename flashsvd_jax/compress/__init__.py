"""Compression of dense models: statistics of a text, ranks, and the factors that lose least."""

from flashsvd_jax.compress.budget import Target
from flashsvd_jax.compress.calibration import Calibration
from flashsvd_jax.compress.methods import METHODS
from flashsvd_jax.compress.pipeline import compress
from flashsvd_jax.compress.recipe import Recipe

__all__ = ["METHODS", "Calibration", "Recipe", "Target", "compress"]
