"""Sizes of the persistent kernel that are found by measurement, not by thought.

What was measured on a device is data, `tuned/<device>.json`, each figure with what it was chosen by; `bench/persistent_times.py`
measures again. What serves larger layers or batches better is told there by the size from which on it holds, then what serves
layers whose ranks differ; the last that holds counts. A device without a table takes the H200's: every one that runs this kernel is
the same chip with other memory. Where memory is slower that has more tiles on their way than it needs, which costs a percent or
two, where too few cost eight.
"""

import dataclasses
import functools

from pallas_kernels.target import H200
from pallas_kernels.tuned import table


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Sizes.

    Attributes:
      tiles_in_flight: tiles of 16 KiB that a program has asked for and not got, whole or with a half: then two are asked for
        together. Fewer leave memory idle, more make words wait behind weights.
      words_at_once: words that a thread waits for together, at the most: as many as its registers hold.
      largest_input: tiles; a phase with a larger input is split, so that more of shared memory is left for weights.
      whole_row_tiles: from so many row tiles a program on, they are shared out whole.
      uneven_tiles: they are, too, where that makes no program's share longer by more tiles than this: who reads the output then has
        fewer words to read, one for each split.
      most_parts: of a sequence's positions.
      kilobyte_tiles: what reading a kilobyte of words costs, in tiles, by which phases are divided; 0 to divide them so that each
        program has an item. Where it is not, the two before decide what the search begins with, and so little.
      absorbed_bytes: of `pallas_kernels.DecoderLayer.o_gate_up`, the mean over layers: larger ones take longer to read than the
        wait that they save.
      readers: warpgroups that put an input together: 1, the one that multiplies it, or 2, another beside it. Each serves four
        sequences.
    """

    tiles_in_flight: float = 3
    words_at_once: int = 96
    largest_input: int = 12
    whole_row_tiles: int = 16
    uneven_tiles: int = 0
    most_parts: int = 16
    kilobyte_tiles: float = 0.0
    absorbed_bytes: int = 0
    readers: int = 2


@functools.cache
def tuning_for(device: str, batch: int, megabytes: int, differ: bool) -> Tuning:
    """Sizes for a device.

    Args:
      device: the name that it gives itself; "" for the sizes that nobody has measured, `Tuning`'s own.
      batch: sequences.
      megabytes: of weights of a layer, the mean.
      differ: whether layers differ in ranks.
    """
    if not device:
        return Tuning()
    found = table("pallas_kernels.persistent", device) or table("pallas_kernels.persistent", H200.kind)
    sizes = dict(found["tuning"])
    for value, by_least in ((megabytes, found["from_megabytes_a_layer"]), (batch, found["from_batch"])):
        for least, others in sorted(by_least.items(), key=lambda item: int(item[0])):
            sizes |= others if value >= int(least) else {}
    sizes |= found["where_layers_differ"] if differ else {}
    return Tuning(**sizes)
