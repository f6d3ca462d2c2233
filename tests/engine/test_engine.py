"""The engine against a plain loop over whole sequences: batches, chunks, limits, ends, and bad requests."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_decoder import full

from flashsvd_jax import prompt_chunks
from flashsvd_jax.config import ModelConfig, RopeConfig
from flashsvd_jax.engine import Engine, TokenBlock
from flashsvd_jax.errors import KernelError, RequestError
from flashsvd_jax.kv_cache import cache_bytes
from flashsvd_jax.models import decoder
from flashsvd_jax.models.weights import weights_from_params
from flashsvd_jax.sampling import SamplingParams
from flashsvd_jax.sampling.counts import TokenCounts
from flashsvd_jax.sampling.device import sample, sampling_arrays
from flashsvd_jax.schema import nest, schema
from pallas_kernels.persistent.stalls import of_wait

Complete = Callable[[Engine, Sequence[Sequence[int]], Sequence[SamplingParams]], list[list[int]]]

LENGTHS = [3, 33, 16, 50]  # within one chunk of 16, one token into a third, a whole chunk, in the fourth
NEW = 21
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW)
SAMPLED = [
    SamplingParams(seed=1, max_tokens=NEW),
    SamplingParams(seed=2, max_tokens=NEW, temperature=0.8, top_k=20, repetition_penalty=1.3),
    SamplingParams(seed=3, max_tokens=NEW, top_p=0.9, presence_penalty=1.5, frequency_penalty=0.7),
    SamplingParams(temperature=0.0, max_tokens=NEW, repetition_penalty=1.5, frequency_penalty=0.5),
]

_sample = jax.jit(sample)


@pytest.fixture(scope="module")
def prompts(tiny: Any) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, tiny.config.vocab_size, length).tolist() for length in LENGTHS]


def plain_loop(engine: Engine, prompt: Sequence[int], p: SamplingParams, count: int) -> tuple[list[int], np.ndarray]:
    """Tokens chosen one at a time from the logits of the whole sequence so far, and those logits [count, vocab]."""
    vocab, tokens, used = engine.config.vocab_size, list(prompt), []
    options = sampling_arrays([p], (), vocab, [0])
    in_prompt = np.isin(np.arange(vocab), prompt)[None]
    for step in range(count):
        padded = np.pad(np.array(tokens, np.int32), (0, engine.max_length - len(tokens)))[None]
        mask = np.arange(engine.max_length)[None] < len(tokens)
        logits = np.asarray(full(engine.config, engine.weights, padded, mask))[:, len(tokens) - 1]
        in_output = np.bincount(np.array(tokens[len(prompt) :], int), minlength=vocab).astype(np.int32)[None]
        chosen = _sample(logits, options, TokenCounts(in_prompt, in_output), np.array([step], np.int32))  # type: ignore[arg-type]
        tokens.append(int(chosen.token[0]))
        used.append(logits[0])
    return tokens[len(prompt) :], np.array(used)


@pytest.fixture(scope="module")
def greedy(tiny: Any, prompts: list[list[int]]) -> list[list[int]]:
    return [plain_loop(tiny.engine(), prompt, GREEDY, NEW)[0] for prompt in prompts]


@pytest.fixture(scope="module")
def drawn(tiny: Any, prompts: list[list[int]]) -> list[list[int]]:
    return [plain_loop(tiny.engine(), prompt, p, NEW)[0] for prompt, p in zip(prompts, SAMPLED, strict=True)]


def test_the_model_of_these_tests_says_different_things(greedy: list[list[int]], drawn: list[list[int]]) -> None:
    """Otherwise a token from the wrong place could be the right one."""
    assert len({token for row in greedy for token in row}) > NEW
    assert len({token for row in drawn for token in row}) > NEW


def test_prompts_of_one_batch_give_what_a_plain_loop_gives(
    tiny: Any, complete: Complete, prompts: list[list[int]], greedy: list[list[int]], drawn: list[list[int]]
) -> None:
    engine = tiny.engine(batch=4)
    assert complete(engine, prompts, [GREEDY] * 4) == greedy
    assert complete(engine, prompts, SAMPLED) == drawn
    mixed = [SAMPLED[0], GREEDY, SAMPLED[2], GREEDY]
    assert complete(engine, prompts, mixed) == [drawn[0], greedy[1], drawn[2], greedy[3]]


def test_one_prompt_alone_gives_what_a_plain_loop_gives(
    tiny: Any, complete: Complete, prompts: list[list[int]], greedy: list[list[int]], drawn: list[list[int]]
) -> None:
    engine = tiny.engine(batch=1)
    for prompt, p, want, want_drawn in zip(prompts, SAMPLED, greedy, drawn, strict=True):
        assert complete(engine, [prompt], [GREEDY]) == [want]
        assert complete(engine, [prompt], [p]) == [want_drawn]


@pytest.mark.parametrize("rows", [(0,), (3, 0), (2, 1, 3), (3, 2, 1, 0)])
def test_a_row_does_not_depend_on_its_place_nor_on_rows_that_fill_the_batch(
    tiny: Any, complete: Complete, prompts: list[list[int]], drawn: list[list[int]], rows: tuple[int, ...]
) -> None:
    got = complete(tiny.engine(batch=4), [prompts[i] for i in rows], [SAMPLED[i] for i in rows])
    assert got == [drawn[i] for i in rows] + [[]] * (4 - len(rows))


def test_padding_counts_as_no_token_of_the_prompt(tiny: Any, complete: Complete) -> None:
    """Padding is token 0; an encouraging penalty shows whether it was taken for one that the prompt has."""
    p = dataclasses.replace(GREEDY, repetition_penalty=0.01, max_tokens=3)
    engine = tiny.engine(batch=4)
    prompts = [[token] * length for token, length in zip((7, 60, 113, 251), LENGTHS, strict=True)]
    loops = [plain_loop(engine, prompt, p, 3) for prompt in prompts]
    assert any(logits[0, 0] > 0 for _, logits in loops) and not any(0 in tokens for tokens, _ in loops)
    assert complete(engine, prompts, [p] * 4) == [tokens for tokens, _ in loops]


@pytest.mark.parametrize("decode_chunk", [1, 3, 8, 32])
def test_the_number_of_tokens_in_a_dispatch_changes_nothing(
    tiny: Any, prompts: list[list[int]], drawn: list[list[int]], decode_chunk: int
) -> None:
    rows = [2, 0]  # prompts of one chunk
    engine = tiny.engine(batch=4, decode_chunk=decode_chunk)
    blocks = list(engine.generate([prompts[row] for row in rows], [SAMPLED[row] for row in rows]))
    assert [len(block.tokens) for block in blocks] == [1] + [decode_chunk] * -(-(NEW - 1) // decode_chunk)
    assert rows_of(blocks)[:2] == [drawn[row] for row in rows]


@pytest.mark.parametrize("prefill_chunk", [16, 32, 1024])
def test_the_size_of_a_prompts_chunks_changes_nothing(
    tiny: Any, complete: Complete, prompts: list[list[int]], drawn: list[list[int]], prefill_chunk: int
) -> None:
    assert complete(tiny.engine(batch=4, prefill_chunk=prefill_chunk), prompts, SAMPLED) == drawn


def test_chunks_of_several_units_change_nothing(
    tiny: Any, complete: Complete, prompts: list[list[int]], drawn: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"keeps_scores": lambda: False, "UNIT_WITHOUT_SCORES": 16, "TOKENS_AT_ONCE": 4 * 32}.items():
        monkeypatch.setattr(prompt_chunks, name, value)
    engine = Engine(tiny.config, tiny.weights, batch=4, max_length=96)
    assert [engine.chunks.lengths(n) for n in (33, 50)] == [[32, 16], [32, 32]]
    assert complete(engine, prompts, SAMPLED) == drawn


def test_tokens_after_the_end_of_a_row_are_minus_one(tiny: Any, prompts: list[list[int]]) -> None:
    params = [dataclasses.replace(GREEDY, max_tokens=n) for n in (1, 8, 17)]
    blocks = list(tiny.engine(batch=4).generate(prompts[:3], params))
    tokens = np.concatenate([block.tokens for block in blocks])
    for row, limit in enumerate([1, 8, 17, 0]):
        assert (tokens[:limit, row] >= 0).all() and (tokens[limit:, row] == -1).all()


@pytest.mark.parametrize("limits", [(1, 2, 9, 10), (8, 1, 1, 1), (1, 1, 1, 1), (17, 16, 21, 5)])
def test_each_row_has_its_own_limit(
    tiny: Any, complete: Complete, prompts: list[list[int]], drawn: list[list[int]], limits: tuple[int, ...]
) -> None:
    params = [dataclasses.replace(p, max_tokens=n) for p, n in zip(SAMPLED, limits, strict=True)]
    assert complete(tiny.engine(batch=4), prompts, params) == [row[:n] for row, n in zip(drawn, limits, strict=True)]


def test_a_stop_token_ends_its_row_and_no_other(
    tiny: Any, complete: Complete, prompts: list[list[int]], greedy: list[list[int]]
) -> None:
    stops = [
        greedy[0][0],
        greedy[1][6],
        greedy[2][8],
        greedy[3][9],
    ]  # by the prompt's step, in a dispatch, last in it, first
    params = [dataclasses.replace(GREEDY, stop_token_ids=[stop]) for stop in stops]
    want = [upto(row, stop) for row, stop in zip(greedy, stops, strict=True)]
    assert len({len(row) for row in want}) > 2
    assert complete(tiny.engine(batch=4), prompts, params) == want
    alone = [params[1], *[GREEDY] * 3]
    assert complete(tiny.engine(batch=4), prompts[1:] + prompts[:1], alone) == [
        want[1],
        greedy[2],
        greedy[3],
        greedy[0],
    ]


def test_greedy_tokens_are_the_same_from_either_kind_of_steps(tiny: Any, prompts: list[list[int]]) -> None:
    """Who wants log-probabilities gets them from the steps that serve every option."""
    engine = tiny.engine(batch=4)
    endless = dataclasses.replace(GREEDY, max_tokens=None)
    stops = rows_of(list(engine.generate(prompts, [endless] * 4)))
    for params in (
        [GREEDY, dataclasses.replace(GREEDY, max_tokens=9), dataclasses.replace(GREEDY, max_tokens=1), endless],
        [dataclasses.replace(endless, stop_token_ids=[row[place]]) for row, place in zip(stops, (3, 8, 9, 16), strict=True)],
    ):  # fmt: skip
        greedy = list(engine.generate(prompts, params))
        every = list(engine.generate(prompts, [dataclasses.replace(p, logprobs=0) for p in params]))
        assert all(block.sampled is None for block in greedy)
        assert len(greedy) > 2
        assert all(block.sampled is not None for block in every)
        assert [block.tokens.tolist() for block in greedy] == [block.tokens.tolist() for block in every]


def decode_with(monkeypatch: pytest.MonkeyPatch, stall: Callable[[jax.Array], jax.Array]) -> list[list[int]]:
    """From now on decoders stall as told of their positions [batch]; fills the list with those of every step."""
    steps: list[list[int]] = []
    decode = decoder.decode

    def observed(config: Any, weights: Any, cache: Any, tokens: jax.Array, positions: jax.Array, *rest: Any) -> Any:
        jax.debug.callback(lambda at: steps.append(at.tolist()), positions, ordered=True)
        cache, logits, carried = decode(config, weights, cache, tokens, positions, *rest)
        return cache, logits, dataclasses.replace(carried, stall=stall(positions))

    monkeypatch.setattr(decoder, "decode", observed)
    return steps


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "drawn"])
def test_no_step_is_taken_once_all_rows_have_ended(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    steps = decode_with(monkeypatch, lambda at: jnp.zeros((4,), jnp.int32))
    engine = tiny.new_engine(batch=2, decode_chunk=4)
    params = [SamplingParams(temperature=temperature, max_tokens=n, seed=0, ignore_eos=True) for n in (7, 3)]
    rows = rows_of(list(engine.generate([[1, 2, 3], [4] * 10], params)))
    assert list(map(len, rows)) == [7, 3]
    assert steps == [[3, 10], [4, 11], *([at, 12] for at in (5, 6, 7, 8))]
    steps.clear()
    stopping = [
        dataclasses.replace(p, max_tokens=40, stop_token_ids=row[1:2]) for p, row in zip(params, rows, strict=True)
    ]
    rows = rows_of(list(engine.generate([[1, 2, 3], [4] * 10], stopping)))
    assert len(steps) == max(map(len, rows)) - 1


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "drawn"])
def test_the_first_stall_of_a_dispatch_is_told(tiny: Any, monkeypatch: pytest.MonkeyPatch, temperature: float) -> None:
    """Every step from position 5 on gives up, in another place each."""
    stall = lambda at: jnp.where(at[0] < 5, 0, of_wait("down", 0, 0) + at[0]) * jnp.array([1, 0, 0, 0])  # noqa: E731
    steps = decode_with(monkeypatch, stall)
    engine = tiny.new_engine()
    with pytest.raises(KernelError, match="'down' in layer 0, block 5 "):
        list(engine.generate([[1, 2, 3]], [SamplingParams(temperature=temperature, max_tokens=8, ignore_eos=True)]))
    assert steps == [[3], [4], [5]]


def test_nothing_is_computed_long_after_all_rows_have_ended(
    tiny: Any, prompts: list[list[int]], greedy: list[list[int]]
) -> None:
    params = [dataclasses.replace(GREEDY, max_tokens=None, stop_token_ids=row[2:3]) for row in greedy]
    assert len(list(tiny.engine(batch=4).generate(prompts, params))) <= 3


def test_the_models_own_end_tokens_end_a_row_unless_they_are_ignored(
    tiny: Any, complete: Complete, prompts: list[list[int]], greedy: list[list[int]]
) -> None:
    ends = (greedy[0][4], greedy[1][2])
    engine = copy.copy(tiny.engine(batch=4))  # end tokens are arguments of the compiled steps
    engine.config = dataclasses.replace(engine.config, eos_token_ids=ends)
    assert complete(engine, prompts, [GREEDY] * 4) == [upto(row, *ends) for row in greedy]
    ignoring = dataclasses.replace(GREEDY, ignore_eos=True)
    assert complete(engine, prompts, [ignoring] * 4) == greedy
    own = dataclasses.replace(ignoring, stop_token_ids=[greedy[0][7]])
    want = [upto(greedy[0], greedy[0][7]), greedy[1], upto(greedy[2], *ends), []]
    assert complete(engine, prompts[:3], [own, ignoring, GREEDY]) == want


def test_a_completion_ends_when_the_cache_is_full(tiny: Any, complete: Complete, prompts: list[list[int]]) -> None:
    engine = tiny.engine(batch=4)
    longest = (prompts[3] * 2)[: engine.max_length - 1]
    asked = [dataclasses.replace(GREEDY, max_tokens=n) for n in (None, None, 10**6)]
    chosen = [prompts[3], longest, prompts[2]]
    got = complete(engine, chosen, asked)
    assert [len(row) for row in got] == [engine.max_length - len(p) for p in chosen] + [0]
    assert got[0] == plain_loop(engine, chosen[0], GREEDY, len(got[0]))[0]
    assert got[1] == plain_loop(engine, longest, GREEDY, 1)[0]
    assert got[2][:NEW] == plain_loop(engine, chosen[2], GREEDY, NEW)[0]
    assert complete(tiny.engine(batch=1), [longest], [asked[0]]) == [got[1]]


def test_a_cache_that_is_no_whole_number_of_chunks_holds_a_padded_prompt(tiny: Any, complete: Complete) -> None:
    engine = Engine(tiny.config, tiny.weights, batch=4, max_length=89, prefill_chunk=16)
    prompt = np.random.default_rng(1).integers(0, tiny.config.vocab_size, 85).tolist()
    endless = dataclasses.replace(GREEDY, max_tokens=None)
    assert complete(engine, [prompt], [endless])[0] == plain_loop(engine, prompt, GREEDY, 4)[0]


def test_logprobs_stand_beside_their_tokens(tiny: Any, prompts: list[list[int]], drawn: list[list[int]]) -> None:
    """Also where the first token was found in a chunk before the last one."""
    engine = tiny.engine(batch=4)
    blocks = list(engine.generate(prompts, [dataclasses.replace(p, logprobs=2) for p in SAMPLED]))
    assert rows_of(blocks) == drawn
    logprob, best, ids = (
        np.concatenate([np.asarray(getattr(block.sampled, name)) for block in blocks])[:NEW]
        for name in ("logprob", "top_logprobs", "top_ids")
    )
    for row, (prompt, p) in enumerate(zip(prompts, SAMPLED, strict=True)):
        want = np.asarray(jax.nn.log_softmax(plain_loop(engine, prompt, p, NEW)[1]))
        np.testing.assert_allclose(logprob[:, row], want[np.arange(NEW), drawn[row]], atol=1e-4, rtol=0)
        np.testing.assert_allclose(best[:, row, 0], want.max(1), atol=1e-4, rtol=0)
        assert np.array_equal(ids[:, row, 0], want.argmax(1))


def test_nothing_stays_in_an_engine_from_the_sequences_before(
    tiny: Any, complete: Complete, prompts: list[list[int]], greedy: list[list[int]]
) -> None:
    engine = tiny.engine(batch=4)
    endless = dataclasses.replace(SAMPLED[0], max_tokens=None)
    complete(engine, [(prompts[3] * 2)[: engine.max_length - 5]] * 4, [endless] * 4)
    assert complete(engine, prompts, [GREEDY] * 4) == greedy
    assert complete(engine, prompts[:1], [GREEDY]) == [greedy[0], [], [], []]


def test_an_iterator_that_is_given_up_leaves_the_engine_usable(
    tiny: Any, complete: Complete, prompts: list[list[int]], drawn: list[list[int]]
) -> None:
    engine = tiny.engine(batch=4)
    for blocks_read in range(3):
        blocks: Any = engine.generate(prompts, SAMPLED)
        for _ in range(blocks_read):
            next(blocks)
        blocks.close()
        assert complete(engine, prompts, SAMPLED) == drawn


def test_iterators_of_one_engine_may_take_turns(tiny: Any, prompts: list[list[int]], drawn: list[list[int]]) -> None:
    engine = tiny.engine(batch=1)
    iterators: list[Iterator[TokenBlock]] = [engine.generate([prompts[row]], [SAMPLED[row]]) for row in (0, 1)]
    blocks = list(zip(*iterators, strict=True))
    assert [rows_of(taken)[0] for taken in zip(*blocks, strict=True)] == drawn[:2]


def test_seeds_are_drawn_anew_where_none_is_given(tiny: Any, complete: Complete, prompts: list[list[int]]) -> None:
    unseeded = dataclasses.replace(SAMPLED[0], seed=None)
    rows = [*complete(tiny.engine(batch=4), prompts[:1] * 4, [unseeded] * 4)]
    rows += complete(tiny.engine(batch=4), prompts[:1] * 4, [unseeded] * 4)
    assert len({tuple(row) for row in rows}) == 8


BAD_REQUESTS = {
    "no prompts": ([], "between 1 and 4 prompts"),
    "too many prompts": ([[1]] * 5, "between 1 and 4 prompts"),
    "empty": ([[]], "the prompt is empty"),
    "second empty": ([[1], []], "prompt 1 is empty"),
    "too long": ([[1] * 96], "the prompt has 96 tokens; the cache holds 96 .*: shorten the prompt"),
    "third too long": ([[1], [1], [1] * 500], "prompt 2 has 500 tokens; .*: shorten the prompt"),
    "negative token": ([[1, -1, 2]], "the prompt has token ids outside the vocabulary of 320"),
    "token too large": ([[1], [1, 320]], "prompt 1 has token ids outside the vocabulary of 320"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_a_request_that_cannot_be_served_is_an_error(tiny: Any, case: str) -> None:
    prompts, message = BAD_REQUESTS[case]
    with pytest.raises(RequestError, match=message):
        next(tiny.engine(batch=4).generate(prompts, [GREEDY] * len(prompts)))


def test_more_room_is_advised_where_the_model_knows_more_positions(tiny: Any) -> None:
    engine = Engine(tiny.config, tiny.weights, max_length=32)
    with pytest.raises(RequestError, match=r"32 tokens; the cache holds 32 .*: raise max_length or shorten the prompt"):
        next(engine.generate([[1] * 32], [GREEDY]))


def test_prompts_and_options_are_paired(tiny: Any) -> None:
    with pytest.raises(RequestError, match="as many options"):
        next(tiny.engine(batch=4).generate([[1], [2]], [GREEDY]))


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"max_length": 1}, {"decode_chunk": 0}, {"prefill_chunk": 0}])
def test_sizes_that_make_no_engine_are_an_error(tiny: Any, sizes: dict[str, int]) -> None:
    with pytest.raises(RequestError, match=next(iter(sizes))):
        Engine(tiny.config, tiny.weights, **{"max_length": 32, **sizes})  # type: ignore[arg-type]


@pytest.mark.parametrize("batch", [1, 4])
def test_a_decode_step_needs_little_memory_beside_the_cache(batch: int) -> None:
    """Less than another cache, which it would need if the update were not in place: at most a copy of one layer's share."""
    layers, slots = 2, 2**14 // batch
    config = ModelConfig(
        model_type="llama", vocab_size=32, hidden_size=32, intermediate_size=32, num_layers=layers, num_heads=2, num_kv_heads=2,
        head_dim=64, max_position=slots, norm_eps=1e-6, rope=RopeConfig(), windows=(None,) * layers,
    )  # fmt: skip
    params = nest({name: np.zeros(spec.shape, np.float32) for name, spec in schema(config).items()})
    weights = weights_from_params(config, params)
    step = Engine(config, weights, batch=batch, max_length=slots).lower_decode().compile().memory_analysis()
    cache = cache_bytes(config, batch, slots, itemsize=4)
    assert cache >= 2**24
    assert step.alias_size_in_bytes >= cache  # the donated cache is the one that comes out
    assert step.temp_size_in_bytes < 1.1 * cache / layers


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_decode_step_can_be_made_in_half_precision(tiny: Any, dtype: str, greedy: bool) -> None:
    """Traced only: what a step gives back must have the types of what it takes."""
    weights = jax.tree.map(lambda a: np.asarray(a).astype(jnp.dtype(dtype)), tiny.weights)
    text = Engine(tiny.config, weights, batch=2, max_length=32).lower_decode(greedy=greedy).as_text()
    assert {"bfloat16": "xbf16>", "float16": "xf16>"}[dtype] in text


def rows_of(blocks: Sequence[TokenBlock]) -> list[list[int]]:
    columns = np.concatenate([block.tokens for block in blocks]).T.tolist()
    return [[token for token in column if token >= 0] for column in columns]


def upto(row: list[int], *ends: int) -> list[int]:
    """A row up to its first end token, which the engine still gives."""
    return row[: min((row.index(end) + 1 for end in ends if end in row), default=len(row))]
