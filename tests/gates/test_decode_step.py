"""A token is one thing for the host to send, and moves neither weights nor cache: the engine's step compiled for an H200."""

import pytest
from cuda_compile import compile_lowered_by
from decode_steps import lower_decode, two_layers

from flashsvd_jax.kv_cache import cache_bytes

SLOTS = 8192
# Sampling holds five rows of float32 logits a sequence at once. Of the weights only the smallest factors and none of the cache's
# arrays would fit into a sixth. The persistent kernel's words are as many as the outputs of two layers, in up to eight parts.
LOGIT_ROWS = 6
WORDS = 160_000

KINDS = ("dense", "low-rank", "mixed")
NAMES = ("llama-2-7b", "llama-3.1-8b")
CASES = [*((name, kind, 1) for name in NAMES for kind in KINDS), *((name, "low-rank", 4) for name in NAMES)]


@pytest.mark.parametrize(("name", "kind", "batch"), CASES)
def test_a_token_is_one_command_buffer_and_copies_nothing(name: str, kind: str, batch: int) -> None:
    config = two_layers(name, kind)
    compiled = compile_lowered_by(lower_decode, name, kind, batch, SLOTS)
    assert [thunk.kind for thunk in compiled.loop_body()] == ["kCommandBuffer"]
    assert compiled.temp_bytes <= batch * (LOGIT_ROWS * config.vocab_size + 2 * WORDS) * 4
    assert compiled.alias_bytes >= cache_bytes(config, batch, SLOTS)
