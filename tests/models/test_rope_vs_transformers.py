"""Every rotary scaling against transformers: frequencies and attention factor, then whole models, in both config spellings."""

from typing import Any

import numpy as np
import pytest
import torch
from compiled_decoder import device_weights, extend_logits, full, prefill_logits, used_cache
from hf_models import Reference, build_model, reference_of
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from flashsvd_jax.config import ModelConfig
from flashsvd_jax.models.decoder import rotations_ahead
from flashsvd_jax.rope import rotary_tables

HEAD_DIM = 32
MAX_POSITION = 64  # of the small configs; what `dynamic` stretches beyond
FACTORS = {  # one for each pair of a head's elements, all different
    "short_factor": [1.0 + 0.02 * i for i in range(HEAD_DIM // 2)],
    "long_factor": [1.5 + 0.3 * i for i in range(HEAD_DIM // 2)],
}
SMALL_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
              "beta_fast": 3.0, "beta_slow": 0.3}  # fmt: skip

# Small enough for a model of these positions to see every branch: kept, blended and slowed frequencies.
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "yarn": SMALL_YARN,
    "yarn_mscale": {**SMALL_YARN, "mscale": 1.3, "mscale_all_dim": 0.6},
    "yarn_attention_factor": {**SMALL_YARN, "attention_factor": 1.7},
    "yarn_fractional_range": {**SMALL_YARN, "truncate": False},
    "longrope": {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 24, **FACTORS},
    "longrope_ratio": {"rope_type": "longrope", "original_max_position_embeddings": 24, **FACTORS},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 40},
}  # fmt: skip

# As published models have them.
LARGE: dict[str, dict[str, Any]] = {
    "llama3.1": {"head_dim": 128, "max_position_embeddings": 131072, "rope_theta": 500000.0,
                 "rope_scaling": {**SCALINGS["llama3"], "original_max_position_embeddings": 8192}},
    "qwen2.5_yarn": {"head_dim": 128, "max_position_embeddings": 131072, "rope_theta": 1e6,
                     "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
    "codellama": {"head_dim": 128, "max_position_embeddings": 16384, "rope_theta": 1e6},
    # So long that even the slowest pair turns: the blended range ends beyond the last frequency.
    "yarn_beyond_the_last_pair": {"head_dim": 128, "max_position_embeddings": 2**20, "rope_theta": 10000.0,
                                  "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2**18}},
}  # fmt: skip

Spelling = str


@pytest.fixture(params=["rope_parameters", "rope_scaling"])
def spelling(request: pytest.FixtureRequest) -> Spelling:
    return request.param


@pytest.fixture(params=SCALINGS)
def scaling(request: pytest.FixtureRequest) -> dict[str, Any]:
    return SCALINGS[request.param]


def spell(scaling: dict[str, Any], spelling: Spelling, theta: float = 1000.0) -> dict[str, Any]:
    """Config fields of a scaling, as transformers 5 writes them or as it was written before."""
    if spelling == "rope_parameters":
        return {"rope_parameters": {"rope_theta": theta, **scaling}}
    old = {("type" if key == "rope_type" else key): value for key, value in scaling.items()}
    return {"rope_theta": theta, "rope_scaling": None if scaling["rope_type"] == "default" else old}


def raw_config(**fields: Any) -> dict[str, Any]:
    sizes = {"model_type": "llama", "vocab_size": 50, "hidden_size": 64, "intermediate_size": 20, "num_hidden_layers": 1,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": HEAD_DIM, "rms_norm_eps": 1e-5,
             "max_position_embeddings": MAX_POSITION}  # fmt: skip
    return {**sizes, **fields}


def assert_same_frequencies(raw: dict[str, Any], length: int) -> None:
    """At position 1 an angle is its frequency, so a table holds frequency and attention factor in polar form."""
    config, hf = ModelConfig.from_hf(raw), LlamaConfig(**_copied(raw))
    kind = hf.rope_parameters["rope_type"]
    if kind == "default":
        want, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(hf)
    else:
        want, factor = ROPE_INIT_FUNCTIONS[kind](hf, seq_len=torch.tensor(length))
    cos, sin = rotary_tables(config.rope, config.head_dim, np.ones((1, 1), np.int32), np.full(1, length, np.int32))
    np.testing.assert_allclose(np.arctan2(sin, cos)[0, 0], want, rtol=1e-6)
    np.testing.assert_allclose(np.hypot(sin, cos)[0, 0], factor, rtol=1e-6)


@pytest.mark.parametrize("length", [1, 24, 25, MAX_POSITION, MAX_POSITION + 1, 1000])
def test_frequencies(scaling: dict[str, Any], spelling: Spelling, length: int) -> None:
    assert_same_frequencies(raw_config(**spell(scaling, spelling)), length)


@pytest.mark.parametrize("name", LARGE)
def test_frequencies_of_published_models(name: str) -> None:
    assert_same_frequencies(raw_config(**LARGE[name]), length=5000)


@pytest.mark.parametrize(
    "fields",
    [
        {
            **spell(SMALL_YARN, "rope_scaling"),
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 50.0},
        },
        {**spell(SMALL_YARN, "rope_scaling"), "original_max_position_embeddings": 32},
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "rope_theta": 500.0}, "rope_theta": 1000.0},
    ],
    ids=["both_spellings", "original_length_twice", "theta_twice"],
)
def test_where_a_config_says_a_thing_twice_the_same_one_counts(fields: dict[str, Any]) -> None:
    assert_same_frequencies(raw_config(**fields), length=10)


def test_rotations_ahead_are_those_of_every_step(scaling: dict[str, Any]) -> None:
    """Sequences reach the length from which `dynamic` and `longrope` stretch at different steps."""
    config = ModelConfig.from_hf(raw_config(**spell(scaling, "rope_parameters")))
    start = np.array([MAX_POSITION - 4, 22, 0], np.int32)
    ahead = np.asarray(rotations_ahead(config, start, 6))
    for step, rotation in enumerate(ahead):
        positions = start + np.int32(step)
        cos, sin = rotary_tables(config.rope, config.head_dim, positions[:, None], positions + 1)
        np.testing.assert_allclose(rotation, np.asarray(cos) + 1j * np.asarray(sin), rtol=0, atol=1e-6)


def test_tables_at_many_positions_are_those_of_transformers() -> None:
    raw = raw_config(**spell(SCALINGS["llama3"], "rope_parameters"))
    config, positions = ModelConfig.from_hf(raw), np.array([[0, 1, 2, 100], [7, 31, 500, 4095]], np.int32)
    cos, sin = rotary_tables(config.rope, config.head_dim, positions, np.full(2, 4096, np.int32))
    want_cos, want_sin = LlamaRotaryEmbedding(LlamaConfig(**_copied(raw)))(torch.zeros(1), torch.tensor(positions))
    for got, want in ((cos, want_cos), (sin, want_sin)):
        assert got.dtype == np.float32
        # One unit in the last place of an angle of thousands of radians.
        np.testing.assert_allclose(got, want[..., : HEAD_DIM // 2], rtol=0, atol=4096 * 1.2e-7)


def model_with(scaling: dict[str, Any]) -> Reference:
    fields = {"head_dim": HEAD_DIM, "num_hidden_layers": 1, "max_position_embeddings": MAX_POSITION}
    return reference_of(build_model("llama", **fields, rope_parameters={"rope_theta": 1000.0, **scaling}))


def draw_tokens(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 71, (batch, length)).astype(np.int32)


def test_logits(scaling: dict[str, Any]) -> None:
    pair, tokens = model_with(scaling), draw_tokens(2, MAX_POSITION + 9)
    got = full(pair.config, device_weights(pair), tokens)
    np.testing.assert_allclose(got, pair.logits(tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_each_sequence_of_a_batch_is_scaled_for_its_own_length(kind: str) -> None:
    lengths = (10, MAX_POSITION + 1, MAX_POSITION + 9)  # rising: transformers keeps the longest so far of `dynamic`
    pair, tokens = model_with(SCALINGS[kind]), draw_tokens(len(lengths), max(lengths))
    mask = np.arange(tokens.shape[1]) < np.array(lengths)[:, None]
    got = np.asarray(full(pair.config, device_weights(pair), tokens, mask))
    for row, length in enumerate(lengths):
        want = pair.logits(tokens[row : row + 1, :length])
        np.testing.assert_allclose(got[row, :length], want[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_prompt_in_chunks_is_scaled_for_its_whole_length(kind: str) -> None:
    chunk, chunks = 23, 3  # before the last of them the model is still within its first positions
    pair, tokens = model_with(SCALINGS[kind]), draw_tokens(1, chunk * chunks)
    weights, lengths = device_weights(pair), np.full(1, chunk * chunks, np.int32)
    cache, first = prefill_logits(pair.config, weights, used_cache(pair.config, 1, 80), tokens[:, :chunk], lengths)
    got = [first]
    for start in range(chunk, chunk * chunks, chunk):
        part = tokens[:, start : start + chunk]
        cache, logits = extend_logits(pair.config, weights, cache, part, np.int32(start), lengths)
        got.append(logits)
    np.testing.assert_allclose(np.concatenate(got, axis=1), pair.logits(tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize("length", [20, 40])  # the original length lies between
def test_heads_rotated_in_part_are_scaled_too(length: int) -> None:
    scaling = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2], "long_factor": [1.5, 2.0, 3.0], "rope_theta": 1000.0,
               "partial_rotary_factor": 0.6, "original_max_position_embeddings": 24}  # fmt: skip
    fields = {"num_hidden_layers": 1, "original_max_position_embeddings": 24, "rope_parameters": scaling}
    pair, tokens = reference_of(build_model("phi3", **fields)), draw_tokens(2, length)
    assert pair.config.rope is not None and pair.config.rope.columns(pair.config.head_dim) == 6
    got = full(pair.config, device_weights(pair), tokens)
    np.testing.assert_allclose(got, pair.logits(tokens), rtol=0, atol=1e-4)


def test_both_spellings_read_the_same(scaling: dict[str, Any]) -> None:
    new, old = (raw_config(**spell(scaling, name)) for name in ("rope_parameters", "rope_scaling"))
    assert ModelConfig.from_hf(new).rope == ModelConfig.from_hf(old).rope


def _copied(raw: dict[str, Any]) -> dict[str, Any]:
    """Transformers writes into the dictionaries that it is given."""
    return {key: dict(value) if isinstance(value, dict) else value for key, value in raw.items()}
