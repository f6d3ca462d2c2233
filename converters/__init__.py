"""PyTorch checkpoints of compressed models -> folders of the canonical layout and back, without PyTorch."""

from converters.adapters import adapter_folder
from converters.engine import convert
from converters.export import ExportReport, export
from converters.export_formats import EXPORT_FORMATS
from converters.families import FAMILIES
from converters.family import Family
from converters.report import ConversionReport

__flashsvd__ = True  # marks this project's own packages; see flashsvd_jax._siblings

__all__ = [
    "EXPORT_FORMATS",
    "FAMILIES",
    "ConversionReport",
    "ExportReport",
    "Family",
    "adapter_folder",
    "convert",
    "export",
]
