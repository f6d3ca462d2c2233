"""How passes over many tokens are compiled for a model, by how many kinds of layers it has.

Methods that choose ranks by site leave no two layers alike. What is compiled for a shape is then compiled for every layer.
"""

from collections.abc import Sequence
from typing import Any

from pallas_kernels import MOST_KINDS, layer_kinds, target

_NEVER = 2**30
"""Kernels that a graph must have at least, for a program that is to have none."""


def pass_options(layers: Sequence[Any]) -> dict[str, Any] | None:
    """XLA options for a pass over many tokens, None for the default ones.

    Where layers are of more than `MOST_KINDS` kinds, products go to cuBLAS. XLA would else generate a kernel for the shape of each
    and try it in a dozen forms: 280 of them for 32 layers of Llama-2-7B, without trials 39 s in place of 9 (bench/NOTES.md).
    """
    if target().platform != "cuda" or target().interpret or layer_kinds(layers) <= MOST_KINDS:
        return None
    return {"xla_gpu_enable_triton_gemm": False}


def run_options(layers: Sequence[Any]) -> dict[str, Any] | None:
    """The same for a run of layers of a prompt, whose kernels are sent one by one.

    One program serves several runs, and each has its weights elsewhere. As a CUDA graph it took the host longer to send than the
    GPU to compute, which is put down to its being updated for every run; without one it was not timed yet (bench/NOTES.md).
    """
    found = pass_options(layers) or {}
    if target().platform == "cuda" and not target().interpret:
        found = {**found, "xla_gpu_graph_min_graph_size": _NEVER}
    return found or None
