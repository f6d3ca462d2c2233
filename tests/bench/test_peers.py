"""The PyTorch decoders compute what ours computes: same weights, same logits, same greedy tokens, in float32 on the CPU."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from compiled_decoder import full
from jobs import Job
from peers.model import PeerModel
from peers.run import bytes_per_token, random_tensors, rounded_ranks, timed
from peers.steps import VARIANTS, greedy

from flashsvd_jax import benchmark
from flashsvd_jax.config import ModelConfig
from flashsvd_jax.errors import RequestError
from flashsvd_jax.models.weights import DecoderWeights, build_weights
from flashsvd_jax.schema import schema
from flashsvd_jax.shapes import SHAPES, mixed_config, partly_dense_config, shape_config

BATCH, PROMPT, NEW = 2, 7, 5
CONFIGS = {
    "low rank": shape_config("tiny", 0.5),
    "dense": shape_config("tiny"),
    "mixed": mixed_config("tiny", 0.5),
    "partly dense": partly_dense_config("tiny", 0.5),
    "other theta": ModelConfig.from_hf(SHAPES["tiny"] | {"rope_theta": 500.0, "num_hidden_layers": 2}),
}


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def arrays(config: ModelConfig) -> dict[str, np.ndarray]:
    """Named weights; norms are not one, so that a norm left out shows."""
    draw = np.random.default_rng(3)
    found = {}
    for name, spec in schema(config).items():
        noise = draw.standard_normal(spec.shape, np.float32)
        found[name] = 1 + 0.1 * noise if name.endswith(".scale") else noise * spec.shape[-1] ** -0.5
    return found


def both(config: ModelConfig, is_packed: bool = False) -> tuple[DecoderWeights, PeerModel]:
    """Our weights, and the PyTorch model with the same ones."""
    named = arrays(config)
    ours = jax.device_put(build_weights(config, named.__getitem__))
    get: Callable[[str], torch.Tensor] = lambda name: torch.from_numpy(named[name])  # noqa: E731
    return ours, PeerModel(config, get, BATCH, PROMPT + NEW + 1, is_packed)


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_of_prompt_and_steps_are_ours(name: str, is_packed: bool) -> None:
    config = CONFIGS[name]
    ours, peer = both(config, is_packed)
    tokens = np.random.default_rng(5).integers(0, config.vocab_size, (BATCH, PROMPT + NEW))
    expected = np.asarray(full(config, ours, jnp.asarray(tokens, jnp.int32)))
    rows = torch.from_numpy(tokens)
    found = [peer.prefill(rows[:, :PROMPT])]
    found += [peer.decode(rows[:, i : i + 1], torch.tensor([i])) for i in range(PROMPT, PROMPT + NEW)]
    np.testing.assert_allclose(torch.stack(found, 1).numpy(), expected[:, PROMPT - 1 :], atol=2e-4)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "compile"])
@pytest.mark.parametrize("name", ["low rank", "dense"])
def test_every_variant_chooses_our_tokens(name: str, variant: str) -> None:
    config = CONFIGS[name]
    ours, peer = both(config, VARIANTS[variant].is_packed)
    prompt = np.random.default_rng(6).integers(0, config.vocab_size, (BATCH, PROMPT))
    sequence = prompt
    for _ in range(NEW):
        padded = np.pad(sequence, ((0, 0), (0, PROMPT + NEW - sequence.shape[1])))  # one shape: compiled once
        logits = np.asarray(full(config, ours, jnp.asarray(padded, jnp.int32)))[:, sequence.shape[1] - 1]
        sequence = np.concatenate([sequence, logits.argmax(-1)[:, None]], 1)
    step = VARIANTS[variant].build(peer)
    found = [greedy(peer.prefill(torch.from_numpy(prompt)))]
    for position in range(PROMPT, PROMPT + NEW - 1):
        found.append(step(found[-1], torch.tensor([position])))
    np.testing.assert_array_equal(torch.cat(found, 1).numpy(), sequence[:, PROMPT:])


def test_bytes_are_counted_as_ours_are() -> None:
    config = rounded_ranks(shape_config("tiny", 0.6), 16)  # ranks that neither side pads
    ours, peer = both(config)
    assert bytes_per_token(config, peer, 100) == benchmark.bytes_per_token(config, ours, BATCH, 100)


def test_ranks_are_rounded_down() -> None:
    config = shape_config("llama-2-7b", 0.5)
    ranks = rounded_ranks(config).factorization.rank_by_site
    assert ranks["layers_0.mlp.up_proj"] == 1488 and ranks["layers_0.self_attn.o_proj"] == 1024
    assert not rounded_ranks(shape_config("llama-2-7b")).factorization


def test_a_run_is_timed_in_its_parts() -> None:
    config = CONFIGS["other theta"]
    model = PeerModel(config, random_tensors(config, torch.float32, "cpu"), BATCH, PROMPT + NEW + 1)
    calls: list[int] = []

    def step(token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        calls.append(int(position))
        return token

    first, per_step, total = timed(model, step, torch.zeros(BATCH, PROMPT, dtype=torch.long), NEW)
    assert calls == list(range(PROMPT, PROMPT + NEW))
    assert total == pytest.approx(first + NEW * per_step)


def test_models_beyond_plain_llama_are_refused() -> None:
    with pytest.raises(RequestError, match="plain Llama only"):
        PeerModel(shape_config("qwen3-8b"), lambda name: torch.zeros(1), 1, 8)


def test_a_job_survives_its_command_line() -> None:
    from cases import CASES

    job = Job("peers/run.py", "eager", "torch-eager", CASES[:3], 1e12, float("inf"))
    assert Job.from_json(job.to_json()) == job
