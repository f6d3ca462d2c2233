"""A persistent kernel for Hopper: a chain of dependent products in one launch, whose weight stream does not stop between them.

One program lives on each core for the whole launch. Its first warpgroup loads, its second multiplies:

    loading       w w w w w w w w w w w w w w w w w w ...       weight tiles of 16 KiB, in the order in which they will be used;
                      |                                          no input is waited for, so the next phase's tiles come early
    ring          [ 3 on their way | landed ............ ]      all shared memory that inputs leave; 48 KiB on their way suffice
                                        |
    multiplying   input | w w w | words | input | w w | words   the input is put together from words of other programs

A phase is a product. It is cut into items, a tile of 64 output rows times a part of the contraction axis, which go round the
programs. An item's sums are written as words: a float32 whose lowest mantissa bit says that it is there. Who needs a column reads
the words of all parts until each has that bit, and adds them up. So there is no barrier between phases: a program waits for the
columns that it reads, while its next weights are on their way.

Why a word that is read is of this launch: memory of words is zero when a launch begins, each is written once in it, and
launches on one stream do not overlap. Why waiting ends: a program waits only for items of earlier phases, those are taken by all
programs in the order of phases, and all programs are resident, as there are no more of them than cores. If some are not, a wait
gives up after a number of attempts: the launch ends, and what depends on the missing words is NaN.

    plan       what is computed, as data: phases, items, where words lie. Pure Python, and tested as such
    words      what is emitted below Pallas; the only file that knows JAX's internals
    inputs     from words to activations        outputs     from sums to words
    kernel     both warpgroups                  segments    the op `segment`: its phases, and what is refused

Tried so far: compiled for sm_90a (no spills, shared memory within bounds). It has not run on a GPU, and serves only calls that
ask for it by name: inside ``prefer("persistent")``, or in an engine made with ``kernels="persistent"``.
"""

from pallas_kernels.decode import decode_layers
from pallas_kernels.persistent import layers
from pallas_kernels.registry import Implementation

decode_layers.register(Implementation("persistent", layers.run, layers.refuses, layers.unavailable, whole=True))
