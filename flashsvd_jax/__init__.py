"""Serving transformers compressed by SVD: factorized checkpoints in, text out.

model = flashsvd_jax.load("path-or-hub-id")
text = flashsvd_jax.generate(model, "def main(", max_tokens=64, temperature=0.0)
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__flashsvd__ = True  # marks this project's own packages; see flashsvd_jax._siblings

_EXPORTS = {
    "CheckpointError": "errors",
    "Completion": "generation",
    "ConfigError": "errors",
    "ConversionError": "errors",
    "EncoderModel": "encoder_model",
    "FlashSVDError": "errors",
    "KernelError": "errors",
    "MissingExtraError": "errors",
    "Model": "model",
    "ModelNotFoundError": "errors",
    "Piece": "generation",
    "RequestError": "errors",
    "SamplingParams": "sampling",
    "batch_generate": "generation",
    "compile_count": "compile_cache",
    "encode": "encoding",
    "expect_no_compile": "compile_cache",
    "generate": "generation",
    "inspect": "inspection",
    "load": "model",
    "load_encoder": "encoder_model",
    "load_params": "checkpoint",
    "perplexity": "scoring",
    "score": "scoring",
    "stream_generate": "generation",
}

__all__ = [
    "CheckpointError",
    "Completion",
    "ConfigError",
    "ConversionError",
    "EncoderModel",
    "FlashSVDError",
    "KernelError",
    "MissingExtraError",
    "Model",
    "ModelNotFoundError",
    "Piece",
    "RequestError",
    "SamplingParams",
    "__version__",
    "batch_generate",
    "compile_count",
    "convert",
    "encode",
    "expect_no_compile",
    "export",
    "generate",
    "inspect",
    "load",
    "load_encoder",
    "load_params",
    "perplexity",
    "score",
    "stream_generate",
]

if TYPE_CHECKING:
    from converters import convert, export
    from flashsvd_jax.checkpoint import load_params
    from flashsvd_jax.compile_cache import compile_count, expect_no_compile
    from flashsvd_jax.encoder_model import EncoderModel, load_encoder
    from flashsvd_jax.encoding import encode
    from flashsvd_jax.errors import (
        CheckpointError,
        ConfigError,
        ConversionError,
        FlashSVDError,
        KernelError,
        MissingExtraError,
        ModelNotFoundError,
        RequestError,
    )
    from flashsvd_jax.generation import Completion, Piece, batch_generate, generate, stream_generate
    from flashsvd_jax.inspection import inspect
    from flashsvd_jax.model import Model, load
    from flashsvd_jax.sampling import SamplingParams
    from flashsvd_jax.scoring import perplexity, score


def __getattr__(name: str) -> Any:
    """Imports public names when first used: the command line starts without waiting for JAX."""
    if name in ("convert", "export"):  # of a sibling package; nothing else here knows of checkpoint families
        from flashsvd_jax import _siblings

        return getattr(_siblings.load("converters"), name)
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
