"""How passes over many tokens are compiled for a model, by how many kinds of layers it has.

Methods that choose ranks by site leave no two layers alike. What is compiled for a shape is then compiled for every layer.
"""

from collections.abc import Sequence
from typing import Any

from pallas_kernels import MOST_KINDS, layer_kinds, target

_WHOLE_SUMS = {"xla_gpu_experimental_force_split_k": 1}
"""First factors have few columns, and XLA would compute parts of their sums side by side and add these in a kernel of its own,
untried. Left whole, libraries that are tried out split them where it helps: a prompt of 512 tokens takes 0.3 ms less."""
_AS_FOUND = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}
"""Products by cuBLAS as it chooses: nothing is generated for a shape, and nothing tried out."""


def pass_options(layers: Sequence[Any]) -> dict[str, Any] | None:
    """XLA options for a pass over many tokens, None for the default ones.

    Where layers are of more than `MOST_KINDS` kinds, products go to cuBLAS, untried. XLA would else generate a kernel for the shape
    of each and try it in a dozen forms, 280 of them for 32 layers of Llama-2-7B; trials of cuBLAS's algorithms alone took the first
    call of a process from 16 to 59 s, and won nothing (bench/NOTES.md).
    """
    if target().platform != "cuda" or target().interpret:
        return None
    return _WHOLE_SUMS if layer_kinds(layers) <= MOST_KINDS else _WHOLE_SUMS | _AS_FOUND
