"""What goes into a decoder's first layer."""

from typing import Any

from flashsvd_jax.config import ModelConfig


def embed(config: ModelConfig, embedding: Any, table: Any, tokens: Any, positions: Any) -> Any:
    """The residual stream [batch, tokens, embed] of token ids, in the embedding's dtype; arrays of numpy stay with numpy.

    Args:
      config: the model.
      embedding: [vocab, embed].
      table: of positions, [positions, embed], where the model has one. Padding behind the last one reads the last one.
      tokens: int32 [batch, tokens].
      positions: int32 [batch, tokens].
    """
    x = embedding[tokens]
    if config.embedding_scale != 1:
        x = x * x.dtype.type(config.embedding_scale)
    return x if table is None else x + table[(positions + config.first_position).clip(max=table.shape[0] - 1)]
