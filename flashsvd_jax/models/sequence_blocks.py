"""A pass over many sequences, a block of them after the other inside one program, so that it takes the memory of a block."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def block_size(batch: int, tokens: int, block_tokens: int | None) -> int:
    """Sequences of a block: all, or even shares of at most ``block_tokens`` tokens, but one sequence at least."""
    most = batch if block_tokens is None else max(1, block_tokens // tokens)
    return -(-batch // -(-batch // most))


def tokens_together(batch: int, tokens: int, block_tokens: int | None) -> int | None:
    """Tokens of a block, None where all are computed together."""
    size = block_size(batch, tokens, block_tokens)
    return None if size == batch else size * tokens


def in_blocks(of_sequences: Callable[..., jax.Array], block_tokens: int | None, *arrays: Any) -> jax.Array:
    """``of_sequences(*arrays)``, block by block.

    A loop that is compiled as one, not a chain of blocks: XLA would be free to compute those beside each other. Where blocks are
    not even, the last one computes its last sequence more than once.

    Args:
      of_sequences: treats each sequence by itself.
      block_tokens: at most so many tokens are computed together, but one sequence at least; all if None.
      arrays: the first one [batch, tokens], all others [batch, ...] or None.

    Returns:
      [batch, ...], what ``of_sequences`` gives.
    """
    batch, tokens = jax.tree.leaves(arrays)[0].shape
    size = block_size(batch, tokens, block_tokens)
    if size == batch:
        return of_sequences(*arrays)
    count = -(-batch // size)

    def blocks(array: jax.Array) -> jax.Array:
        missing = [(0, count * size - batch), *[(0, 0)] * (array.ndim - 1)]
        return jnp.pad(array, missing, "edge").reshape(count, size, *array.shape[1:])

    found = lax.map(lambda block: of_sequences(*block), jax.tree.map(blocks, arrays))
    return found.reshape(-1, *found.shape[2:])[:batch]
