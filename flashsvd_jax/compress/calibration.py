"""The text that statistics are taken of, as windows of tokens."""

import dataclasses
import hashlib
import itertools

import numpy as np

from flashsvd_jax.any_config import AnyConfig
from flashsvd_jax.encoder_config import EncoderConfig
from flashsvd_jax.errors import RequestError
from flashsvd_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Calibration:
    """How much of a text is read.

    Attributes:
      text: any text; one that is like what the model will be used for is best.
      name: of the text, for messages and the record of how a model was made.
      samples: number of windows.
      length: tokens of each.
      seed: chooses the windows, where the text has more.
    """

    text: str
    name: str
    samples: int = 128
    length: int = 512
    seed: int = 0

    def windows(self, tokenizer: Tokenizer, config: AnyConfig) -> np.ndarray:
        """Token ids, int32 [samples, length]: some of the windows that lie side by side in the text, so that none is read twice.
        An encoder's each begin and end as its texts do, with the tokenizer's special tokens.

        Raises:
          RequestError: the text is too short, its tokens are none of the model's, or the numbers are out of range.
        """
        if self.samples < 1:
            raise RequestError(f"samples must be at least 1, not {self.samples}")
        if self.seed < 0:
            raise RequestError(f"seed must be at least 0, not {self.seed}")
        if not 2 <= self.length <= config.max_position:
            raise RequestError(f"length must be from 2 to {config.max_position}, the model's limit, not {self.length}")
        if isinstance(config, EncoderConfig):
            rows = tokenizer.encode_windows(self.text, self.length)
        else:
            rows = [list(row) for row in itertools.batched(tokenizer.encode(self.text), self.length)]
        windows = np.array([row for row in rows if len(row) == self.length], np.int32)
        if len(windows) < self.samples:
            raise RequestError(
                f"{self.name} has {sum(map(len, rows))} tokens, {len(windows)} windows of {self.length}; {self.samples} windows"
                f" need {self.samples * self.length}: give a longer text, or lower samples or length"
            )
        if windows.max() >= config.vocab_size:
            raise RequestError(f"the tokenizer gives ids outside the model's vocabulary of {config.vocab_size}")
        chosen = np.random.default_rng(self.seed).choice(len(windows), self.samples, replace=False)
        return windows[np.sort(chosen)]

    def __str__(self) -> str:
        digest = hashlib.sha256(self.text.encode()).hexdigest()
        windows = f"{self.samples} windows of {self.length} tokens"
        return f"statistics of {windows} of {self.name}, seed {self.seed}, SHA-256 of the text {digest}"
