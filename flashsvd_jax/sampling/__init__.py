"""How the next token is chosen: what a user asks for, and its form on the device."""

from flashsvd_jax.sampling.params import SamplingParams

__all__ = ["SamplingParams"]
