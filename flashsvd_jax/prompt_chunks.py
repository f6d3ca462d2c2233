"""How prompts are cut into chunks: of few lengths, so that few steps are compiled, and long, so that products fill the device."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from flashsvd_jax.kv_cache import CACHE_UNIT
from flashsvd_jax.length_batches import SMALLEST_BUCKET, bucket
from pallas_kernels import keeps_scores, power_of_two
from pallas_kernels.rounding import power_of_two_within

UNIT = 1024
UNIT_WITHOUT_SCORES = 2048
"""Of kernels that keep no scores: a chunk costs less memory, and its products want this many rows."""
TOKENS_AT_ONCE = 8192
"""Of all sequences, where chunks are longer than that: each but the first attends over the cache, which takes longer, and long ones
have quicker products. More would cost gigabytes."""


@dataclasses.dataclass(frozen=True)
class PromptChunks:
    """Lengths of chunks.

    Attributes:
      unit: what does not fill so many tokens has a chunk of its own, a power of two at least as long.
      longest: of a chunk. Whole units are taken together, as many as a power of two says.
      slots: of the cache, such that no padded chunk runs past the last one.
    """

    unit: int
    longest: int
    slots: int

    @classmethod
    def of(cls, batch: int, max_length: int, kernels: str, longest: int | None = None) -> "PromptChunks":
        """For sequences of up to ``max_length`` tokens; ``kernels`` is as for `Engine`, ``longest`` if the caller says it."""
        if longest is not None:
            unit = longest = power_of_two(longest)
        elif kernels == "xla" or keeps_scores():
            unit = longest = UNIT
        else:
            unit = UNIT_WITHOUT_SCORES
            longest = max(unit, power_of_two_within(max(TOKENS_AT_ONCE // batch, 1)))
        whole = CACHE_UNIT if max_length <= unit else max(CACHE_UNIT, unit)
        return cls(unit, longest, -(-max_length // whole) * whole)

    def lengths(self, tokens: int) -> list[int]:
        """The padded lengths of the chunks of a prompt, in order."""
        units, rest = divmod(tokens, self.unit)
        tail = bucket(rest, min(self.unit, self.slots), SMALLEST_BUCKET) if rest else 0
        if tail == self.unit:
            units, tail = units + 1, 0
        found = []
        while units:
            together = min(power_of_two_within(units), self.longest // self.unit)
            found.append(together * self.unit)
            units -= together
        return [*found, tail] if tail else found

    def cuts(self, longest: int) -> list[list[int]]:
        """All that `lengths` gives for prompts of up to so many tokens."""
        tokens = [*range(1, longest, SMALLEST_BUCKET), longest]  # a tail is a whole number of the smallest
        return [list(found) for found in dict.fromkeys(tuple(self.lengths(n)) for n in tokens)]


def cut(prompts: Sequence[Sequence[int]], batch: int, lengths: Sequence[int]) -> list[np.ndarray]:
    """Prompts padded, to so many, and cut into chunks int32 [batch, length] of these lengths."""
    padded = np.zeros((batch, sum(lengths)), np.int32)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = prompt
    return np.split(padded, np.cumsum(lengths)[:-1], axis=1)
