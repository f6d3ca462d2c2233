"""PyTorch checkpoints of compressed models -> folders of the canonical layout, without PyTorch."""

from converters.engine import convert
from converters.families import FAMILIES
from converters.family import Family
from converters.report import ConversionReport

__all__ = ["FAMILIES", "ConversionReport", "Family", "convert"]
