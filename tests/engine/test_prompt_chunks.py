"""How prompts are cut."""

import pytest

from flashsvd_jax.kv_cache import CACHE_UNIT
from flashsvd_jax.prompt_chunks import PromptChunks, cut
from pallas_kernels import Target, assume_target
from pallas_kernels.target import H200


def test_what_is_no_whole_chunk_is_padded_to_a_power_of_two() -> None:
    some = PromptChunks(unit=32, longest=32, slots=128)
    assert [some.lengths(n) for n in (1, 16, 17, 32, 33, 50, 95)] == [
        [16], [16], [32], [32], [32, 16], [32, 32], [32, 32, 32]
    ]  # fmt: skip
    one = PromptChunks(unit=1024, longest=1024, slots=128)
    assert [one.lengths(n) for n in (1, 50, 64, 65, 95)] == [[16], [64], [64], [128], [128]]


def test_whole_units_are_taken_together() -> None:
    chunks = PromptChunks(unit=2048, longest=8192, slots=32768)
    assert [chunks.lengths(n) for n in (2048, 2100, 4000, 5000, 8192, 14000, 26000)] == [
        [2048], [2048, 64], [4096], [4096, 1024], [8192], [8192, 4096, 2048], [8192, 8192, 8192, 2048]
    ]  # fmt: skip


@pytest.mark.parametrize("max_length", [2, 63, 64, 2048, 2049, 9000])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_chunks_hold_a_prompt_and_end_within_the_cache(max_length: int, batch: int) -> None:
    with assume_target(H200):
        chunks = PromptChunks.of(batch, max_length, "auto")
    assert chunks.slots % CACHE_UNIT == 0 and chunks.slots >= max_length
    for tokens in {1, max_length // 3 + 1, max_length - 1, max_length}:
        lengths = chunks.lengths(tokens)
        assert tokens <= sum(lengths) <= chunks.slots
        assert sum(lengths[:-1]) < tokens and max(lengths) <= chunks.longest


@pytest.mark.parametrize(
    ("device", "kernels", "batch", "longest"),
    [
        (Target("cpu"), "auto", 1, 1024), (H200, "xla", 1, 1024), (H200, "auto", 1, 8192), (H200, "auto", 2, 4096),
        (H200, "auto", 3, 2048), (H200, "auto", 64, 2048),
    ],
)  # fmt: skip
def test_chunks_are_longer_where_no_scores_are_kept(device: Target, kernels: str, batch: int, longest: int) -> None:
    with assume_target(device):
        assert PromptChunks.of(batch, 64, kernels).longest == longest


@pytest.mark.parametrize("longest", [1, 16, 17, 300, 4095])
def test_all_cuts_are_told_once(longest: int) -> None:
    for chunks in (PromptChunks(32, 128, 4096), PromptChunks(1024, 1024, 4096), PromptChunks(32, 32, 4096)):
        cuts = chunks.cuts(longest)
        assert {tuple(c) for c in cuts} == {tuple(chunks.lengths(n)) for n in range(1, longest + 1)}
        assert len({tuple(c) for c in cuts}) == len(cuts)


def test_prompts_are_padded_on_the_right() -> None:
    assert [chunk.tolist() for chunk in cut([[1, 2, 3], [4]], 3, [2, 2])] == [
        [[1, 2], [4, 0], [0, 0]], [[3, 0], [0, 0], [0, 0]]
    ]  # fmt: skip
