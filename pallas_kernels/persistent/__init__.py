"""A persistent kernel for Hopper: a step of decoding, all layers and the head, in one launch whose weight stream does not stop.

One program lives on each core for the whole launch. One of its warpgroups loads, one multiplies, and where there are several
sequences a third helps that to put inputs together:

    loading       w w w w w w k v w w w w w w ...     tiles of 16 KiB, weights and the cache's keys and values alike, in the order
                      |                                 in which they will be used; no input is waited for, so they come early
    ring          [ 3 or 4 on their way | landed .. ]  12 or 13 tiles, what memory inputs leave; 56 KiB on their way suffice
                                        |
    multiplying   input | w w w | words | input | w w | words ...   an input is put together from words of other programs

The steps of a layer are phases, each one product, and an attention. The tiles of a phase, 64 output rows by 128 of the contraction
axis, are shared out evenly: a program has a part of the contraction axis and so many tiles of its rows, which may begin and end
within a row tile. An item is what a program has of one row tile; one of attention is a kv head and a part of its positions. What an
item gives is written as words: a float32 whose low eight bits are its epoch, the number of the layer and whether in an odd step.
Who needs a column reads the words of all its items until each is of the epoch it waits for, and adds them up; the residual stream
and what its norm divides by are words too. So there is no barrier anywhere: a program waits for what it reads, while its next
weights are on their way.

Why a word that is read is the one that is meant, within a step of a token: layers take turns in two arrays. Within a layer every
word is written once; it is written again two layers later, by an item whose input depends on every item of the layer between, and
these on every read of the earlier word. A reader that came too late would wait for an epoch that is gone, and give up; it would
not take one for the other. Across steps: the words of a sequence of steps, a dispatch of the engine, are cleared once, before the
first, and no epoch is 0. Then a step finds what the one before has left, as launches on one stream do not overlap. Which words are
written in which layer is the plan's alone, the same in every step whatever the lengths are, so a word that is read in a layer was
written in this layer of the step before, and what is left of it there is of that time or later: it is either of another layer, or
of the same and odd where this is even. Words of two steps before there are none. What a program must know of that, whether the
step is odd, every thread keeps for itself, behind the words.

Why waiting ends: a program waits only for items of earlier steps of its layer or the one before, those are taken by all programs
in the order of steps, and all programs are resident, as there are no more of them than cores. If some are not, a wait gives up
after a number of attempts, makes what depends on it NaN and says where it was; of all that is said, the earliest layer and step
stay (`stalls`), and the engine raises an error.

Every layer has its own arrays, of any rank. Bulk copies need a tensor map of each: a small launch before the first step writes
them, with the addresses, as they do not fit among a launch's parameters. Each step compares these with where its operands are, and
has the weights that the next one reads first brought into the second-level cache. What differs between layers is a number in a
table.

Weights are read once a step, and there are more of them than that cache holds. So their tiles are the first to leave it, and words,
which are read by many programs soon after they are written, and code, which is read once a layer, are not sought in memory.

Gate and up's first factors are of the stream after attention. Where a layer has `DecoderLayer.o_gate_up`, they are of the stream
before it, and the phase of the output's second factors adds what attention changes about their latents. So a layer waits for one
input less, and their tiles are multiplied while words of attention are on their way: there, inputs follow each other faster than
memory can bring what the ring does not hold. The stream after attention is then put together by a step that does only that.

Two factors are two phases. A dense site among low-rank ones, in the same layer or in others, is a product of the first phase; it
has no rows in the second, and who reads it takes its columns from the first: which of both it is, is a number of the table, too.

    steps, sources, plan  what is computed, as data: phases, items, where words lie. Pure Python, and tested as such
    numbers      what differs from layer to layer
    layers       the op `decode_layers`, and what it refuses
    building     its plan         phases     of projections          splitting  what each program has of them
    kernel       the launch       loading, multiplying    its warpgroups      ring     tiles in shared memory
    items        which a program has                      launch   what all parts are given
    columns      of an output, from words     inputs      from columns to activations       gates    on the way
    products     of tiles and inputs          outputs     from sums to words
    stream       the residual stream as words
    heads, attend, attended     attention     ahead       what a step needs beside its tiles
    kept         what launches hand on
    words, copies, products, code, tensor_maps      what is emitted below Pallas; only these know JAX's internals

Words that say themselves that they are there are NCCL's LL protocol.

All of this is code that is run once a layer, so that it is read anew each time where it is more than the instruction cache of a
core holds, about 128 KB. So what is emitted is kept small: `bench/NOTES.md` tells what each part of it cost.
"""

from pallas_kernels.decode import decode_layers
from pallas_kernels.persistent import layers
from pallas_kernels.registry import Implementation

decode_layers.register(
    Implementation(
        "persistent",
        layers.run,
        layers.refuses,
        layers.unavailable,
        whole=True,
        workspace=layers.workspace,
        begin=layers.begin,
    )
)
