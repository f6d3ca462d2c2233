"""The windows of a text that each step reads."""

import numpy as np

from flashsvd_jax.config import ModelConfig
from flashsvd_jax.errors import RequestError
from flashsvd_jax.finetune.settings import Settings
from flashsvd_jax.tokenizer import Tokenizer


class TextWindows:
    """A text as windows side by side, in an order that each pass over the text draws anew; it depends on the seed alone.

    Args:
      text: the text.
      name: of it, for messages.
      tokenizer: of the model.
      config: the model.
      settings: batch, length and seed.

    Raises:
      RequestError: the text has no whole batch, or tokens that the model does not know, or the length is none of the model's.
    """

    def __init__(self, text: str, name: str, tokenizer: Tokenizer, config: ModelConfig, settings: Settings):
        length = settings.length
        if not 2 <= length <= config.max_position:
            raise RequestError(f"length must be from 2 to {config.max_position}, the model's limit, not {length}")
        ids = np.asarray(tokenizer.encode(text), np.int32)
        count = (len(ids) - 1) // length  # each window's last target is the next one's first token
        if count < settings.batch:
            needed = settings.batch * length + 1
            raise RequestError(
                f"{name} has {len(ids)} tokens; a step reads {needed}: give a longer text, or lower batch or length"
            )
        if ids.max() >= config.vocab_size:
            raise RequestError(f"the tokenizer gives ids outside the model's vocabulary of {config.vocab_size}")
        self._ids, self._count, self._settings = ids, count, settings

    def batch(self, step: int) -> np.ndarray:
        """Token ids of a step, int32 [batch, length + 1]; windows that do not fill a batch are left out of that pass."""
        size, length = self._settings.batch, self._settings.length
        number, place = divmod(step, self._count // size)
        order = np.random.default_rng([self._settings.seed, number]).permutation(self._count)
        starts = order[place * size : (place + 1) * size] * length
        return self._ids[starts[:, None] + np.arange(length + 1)]
