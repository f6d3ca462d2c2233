"""Training of a compressed model's factors on a text, to win back what compression lost; the rest of the model stays as it is."""

from flashsvd_jax.finetune.pipeline import finetune
from flashsvd_jax.finetune.settings import Settings

__all__ = ["Settings", "finetune"]
