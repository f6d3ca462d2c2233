"""Reading checkpoints written by PyTorch: no PyTorch is needed and nothing in a checkpoint is executed."""

from converters.sources.base import TensorInfo, TensorSource, folder_of
from converters.sources.open_source import has_weights, open_source
from converters.sources.wrapped_source import WrappedSource

__all__ = ["TensorInfo", "TensorSource", "WrappedSource", "folder_of", "has_weights", "open_source"]
