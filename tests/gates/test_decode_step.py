"""A dispatch is one thing for the host to send, and moves neither weights nor cache: the engine's steps compiled for an H200."""

import jax
import pytest
from cuda_compile import Compiled, compile_for_h200, compile_lowered_by
from decode_steps import decode_slices, lower_decode, two_layers
from decoder_cases import DecoderCase

from flashsvd_jax.kv_cache import cache_bytes
from pallas_kernels.triton.blocks import MATVEC_BATCH

SLOTS = 8192
# Sampling holds five rows of float32 logits a sequence at once. Of the weights only the smallest factors and none of the cache's
# arrays would fit into a sixth. The persistent kernel's words are as many as the outputs of two layers, in up to sixteen parts, and
# of the head; they are kept while tokens are chosen, for which greedy requests need next to nothing.
LOGIT_ROWS = {"greedy": 6, "products": 6, "persistent": 9}
WORDS = 460_000

# Of a greedy step, beside the decoder's own kernels: embedding, rotation, best token, state and output; then what those kernels
# are given, which is the length with the new token. The persistent one is all there is of its kind, and given nothing more.
XLA_LAUNCHES = {"products": 6, "persistent": 5}
# Of a layer where products are on tensor cores: two norms before them, and the partial sums of those that are split.
BESIDE_TENSOR_CORES = 6

KINDS = ("dense", "low-rank", "mixed")
NAMES = ("llama-2-7b", "llama-3.1-8b")
PRODUCTS = [*((name, kind, 1) for name in NAMES for kind in KINDS), *((name, "low-rank", 4) for name in NAMES)]
PERSISTENT = [("llama-2-7b", "low-rank", 1), ("llama-2-7b", "lower", 1), ("llama-3.1-8b", "low-rank", 4)]
CASES = [*((*case, "products") for case in PRODUCTS), *((*case, "persistent") for case in PERSISTENT)]


def compiled_step(name: str, kind: str, batch: int, kernels: str, greedy: bool) -> Compiled:
    config = two_layers(name, kind)
    compiled = compile_lowered_by(lower_decode, name, kind, batch, SLOTS, kernels, greedy=greedy)
    assert [thunk.kind for thunk in compiled.thunks] == ["kCommandBuffer"]
    rows = LOGIT_ROWS["greedy" if greedy else kernels]
    assert compiled.temp_bytes <= batch * (rows * config.vocab_size + 2 * WORDS) * 4
    assert compiled.alias_bytes >= cache_bytes(config, batch, SLOTS)
    # Within a graph a condition that launches nothing is not read anew in each turn, and the loop ends at any time (jax 0.11.2).
    assert [thunk for thunk in compiled.loop_condition() if thunk.kernel is not None]
    return compiled


@pytest.mark.parametrize(("name", "kind", "batch", "kernels"), CASES)
def test_a_greedy_dispatch_is_one_command_buffer_with_few_launches(
    name: str, kind: str, batch: int, kernels: str
) -> None:
    body = [inner for thunk in compiled_step(name, kind, batch, kernels, True).loop_body() for inner in thunk.walk()]
    assert {thunk.kind for thunk in body} <= {"kCustomKernel", "kCustomCall"}  # no condition, no copy
    launches = [thunk.kernel.name for thunk in body if thunk.kernel and "fusion" in thunk.kernel.name]
    beside = 2 * BESIDE_TENSOR_CORES if kernels == "products" and batch > MATVEC_BATCH else 0
    assert 5 <= len(launches) <= XLA_LAUNCHES[kernels] + beside, launches
    assert kernels != "persistent" or [thunk.kind for thunk in body].count("kCustomCall") == 1


@pytest.mark.parametrize(("name", "kind", "batch", "kernels"), [*CASES[:1], *CASES[-2:]])
def test_a_dispatch_with_options_is_one_command_buffer_too(name: str, kind: str, batch: int, kernels: str) -> None:
    kinds = [thunk.kind for thunk in compiled_step(name, kind, batch, kernels, False).loop_body()]
    assert kinds.count("kConditional") == 2  # an order of the tokens, and log-probabilities


def test_the_persistent_kernel_is_launched_as_it_is_whatever_it_is_given() -> None:
    """XLA would make a slice part of the launch, and forget which operands it changes: caches would be copied, words lost."""
    arguments = jax.eval_shape(DecoderCase(2, 512, 1024, 4, 2, (128, 256), (3, 200)).arguments)
    xs = jax.ShapeDtypeStruct((8, *arguments[0].shape), arguments[0].dtype)
    body = [inner for thunk in compile_for_h200(decode_slices, xs, arguments).loop_body() for inner in thunk.walk()]
    with_slices = [inner.kind for thunk in body if thunk.kind == "kDynamicSliceFusion" for inner in thunk.walk()]
    assert [thunk.kind for thunk in body].count("kCustomCall") == 1 and "kCustomCall" not in with_slices
