"""How passes over many tokens are compiled for a model, by how many kinds of layers it has and the memory that it is to take.

Methods that choose ranks by site leave no two layers alike. What is compiled for a shape is then compiled for every layer.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import MOST_KINDS, layer_kinds, target

_BY_LIBRARY = {"xla_gpu_enable_triton_gemm": False}
"""Products by cuBLAS alone, which is tried out, and adds to them what is added. XLA's own kernels are slower for long prompts where
trials of single products find them faster, and leave additions to kernels of their own (bench/NOTES.md)."""
_UNTRIED = {"xla_gpu_autotune_level": 0}
_WITHOUT_WORKSPACE = {"xla_gpu_experimental_autotune_backends": "TRITON,NATIVE_EMITTER,BLOCK_LEVEL_EMITTER"}
"""Products by XLA's own kernels alone. cuBLAS's may want 32 MiB to work in, which a pass then sets aside."""
_WHOLE_SUMS = {"xla_gpu_experimental_force_split_k": 1}
"""XLA's own kernels would compute parts of long sums side by side and add these in a kernel of its own, untried."""

_FEW_TOKENS = range(512, 4097)
"""Of BERT's width these take less memory than cuBLAS's workspace. Products of fewer are of other forms, and not tried so."""


def prompt_options(layers: Sequence[Any]) -> dict[str, Any] | None:
    """XLA options for a decoder's pass over many tokens, None for the default ones.

    Where layers are of more than `MOST_KINDS` kinds, products are not tried out: that took the first call of a process from 16 to
    59 s for 32 layers of Llama-2-7B, and won nothing (bench/NOTES.md).
    """
    if _is_no_gpu():
        return None
    return _BY_LIBRARY if layer_kinds(layers) <= MOST_KINDS else _BY_LIBRARY | _UNTRIED


def encoder_options(layers: Sequence[Any], together: int | None) -> dict[str, Any] | None:
    """The same for an encoder's pass, which does without cuBLAS where `spares_workspace` says so."""
    if _is_no_gpu():
        return None
    if layer_kinds(layers) > MOST_KINDS:
        return _BY_LIBRARY | _UNTRIED
    return _WHOLE_SUMS | _WITHOUT_WORKSPACE if spares_workspace(layers, together) else _WHOLE_SUMS


def spares_workspace(layers: Sequence[Any], together: int | None) -> bool:
    """Whether an encoder's pass is to do without cuBLAS, and XLA's own kernels can serve it.

    Args:
      layers: of the encoder.
      together: tokens that are computed together, where the pass is divided into blocks; None where it is not.
    """
    if together not in _FEW_TOKENS or _is_no_gpu() or target().capability < (8, 0):
        return False
    weights = [leaf for leaf in jax.tree.leaves(list(layers)) if leaf.ndim > 1]
    return layer_kinds(layers) <= MOST_KINDS and all(w.dtype in (jnp.bfloat16, jnp.float16) for w in weights)


def _is_no_gpu() -> bool:
    return target().platform != "cuda" or target().interpret
