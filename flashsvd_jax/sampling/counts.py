"""Which tokens a sequence has seen: what the penalties depend on."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenCounts:
    """Tokens seen, by sequence; an update gives new counts."""

    in_prompt: jax.Array  # bool [batch, vocab]
    in_output: jax.Array  # int32 [batch, vocab]

    def with_prompt(self, tokens: jax.Array, start: jax.Array, lengths: jax.Array) -> "TokenCounts":
        """Marks the tokens [batch, bucket] of prompts from position ``start`` on; what lies beyond a prompt's length is padding."""
        positions = start + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        # An index outside the vocabulary, which a scatter drops.
        columns = jnp.where(positions < lengths[:, None], tokens, self.in_prompt.shape[1])
        rows = jnp.arange(tokens.shape[0])[:, None]
        return dataclasses.replace(self, in_prompt=self.in_prompt.at[rows, columns].set(True, mode="drop"))

    def with_output(self, token: jax.Array, chosen: jax.Array) -> "TokenCounts":
        """Counts a token [batch] of each sequence for which ``chosen`` is true."""
        rows = jnp.arange(token.shape[0])
        more = self.in_output.at[rows, token].add(chosen.astype(jnp.int32), unique_indices=True)
        return dataclasses.replace(self, in_output=more)


def no_counts(batch: int, vocab_size: int) -> TokenCounts:
    """Counts of sequences that have seen nothing."""
    nothing = jnp.zeros((batch, vocab_size), jnp.int32)
    return TokenCounts(nothing.astype(bool), nothing)
