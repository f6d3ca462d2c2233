"""Compression of dense models: statistics of a text, ranks, and the factors that lose least."""

from flashsvd_jax.compress.methods import METHODS

__all__ = ["METHODS"]
