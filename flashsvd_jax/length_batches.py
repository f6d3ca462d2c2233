"""Sequences of all lengths computed together in few shapes: lengths and batch sizes are powers of two."""

import itertools
from collections.abc import Callable, Iterator, Sequence

from pallas_kernels import keeps_scores, power_of_two
from pallas_kernels.rounding import power_of_two_within

SMALLEST_BUCKET = 16
# Memory of the largest temporary of a pass, by which the batch size is chosen where none is given.
_WORKSPACE_BYTES = 2**30


def bucket(length: int, limit: int, smallest: int) -> int:
    """The padded length in which so many tokens are read: a power of two from ``smallest`` on, or the model's ``limit``."""
    return min(max(power_of_two(length), smallest), limit)


def batch_within_workspace(row_bytes: int, count: int) -> int:
    """A power of two: not above what keeps rows of ``row_bytes`` within the workspace, nor above the need of ``count`` rows."""
    return min(power_of_two_within(max(_WORKSPACE_BYTES // row_bytes, 1)), power_of_two(count))


def scores_held(num_heads: int, tokens: int) -> int:
    """Numbers that attention holds for each token: its scores, unless this device has a kernel that keeps none."""
    return num_heads * tokens if keeps_scores() else 0


def length_batches(
    lengths: Sequence[int], buckets: Sequence[int], batch_size: Callable[[int, int], int]
) -> Iterator[tuple[int, int, list[int]]]:
    """Sequences that are computed together.

    Args:
      lengths: of the sequences.
      buckets: the padded length of each.
      batch_size: a padded length and the number of its sequences -> how many are computed together.

    Yields:
      Padded length, batch size, and the numbers of at most so many sequences; the largest first: if memory does not suffice,
      that shows at once.
    """
    order = sorted(range(len(lengths)), key=lambda i: (buckets[i], lengths[i]), reverse=True)
    for padded, group in itertools.groupby(order, key=buckets.__getitem__):
        rows = list(group)
        size = batch_size(padded, len(rows))
        for chunk in itertools.batched(rows, size):
            yield padded, size, list(chunk)
