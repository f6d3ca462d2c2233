"""PyTorch checkpoints of compressed models -> folders of the canonical layout, without PyTorch."""

from converters.engine import convert
from converters.families import FAMILIES
from converters.family import Family
from converters.report import ConversionReport

__flashsvd__ = True  # marks this project's own packages; see flashsvd_jax._siblings

__all__ = ["FAMILIES", "ConversionReport", "Family", "convert"]
