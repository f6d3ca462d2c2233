"""One training step of the bundled model, its data order and its evaluation; `train.py` decides what to run."""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from model_files import HF_CONFIG

from flashsvd_jax.config import ModelConfig
from flashsvd_jax.models.flax_module import Decoder
from flashsvd_jax.schema import nest, schema

Params = Any
CONFIG = ModelConfig.from_hf(HF_CONFIG)
ADAM = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b1=0.9, b2=0.95))


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all trials of a run have in common; lengths are in tokens, the rest in steps."""

    batch_size: int
    seq_len: int
    peak_lr: float
    warmup_steps: int
    eval_every: int
    seed: int


class State(NamedTuple):
    """Float32 master weights, Adam's moments, and the number of steps done."""

    params: Params
    adam: optax.OptState
    step: jax.Array


def initial_state(settings: Settings) -> State:
    """The state that every trial starts from."""
    params = init_params(jax.random.key(settings.seed))
    return State(params, ADAM.init(params), jnp.zeros((), jnp.int32))


def init_params(key: jax.Array) -> Params:
    """Draws float32 parameters: unit norms, small embeddings, projections scaled by their fan-in."""
    residual_scale = (2 * CONFIG.num_layers) ** -0.5

    def draw(name: str, shape: tuple[int, ...], key: jax.Array) -> jax.Array:
        if name.endswith(".scale"):
            return jnp.ones(shape, jnp.float32)
        std = HF_CONFIG["initializer_range"] if name == "embed_tokens.weight" else shape[-1] ** -0.5
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std *= residual_scale
        return std * jax.random.normal(key, shape, jnp.float32)

    specs = schema(CONFIG)
    keys = jax.random.split(key, len(specs))
    return nest({name: draw(name, spec.shape, k) for (name, spec), k in zip(specs.items(), keys, strict=True)})


def loss_fn(params: Params, tokens: jax.Array) -> jax.Array:
    """Mean next-token loss in nats over `tokens` [batch, length + 1], computed in bfloat16 as the model is shipped."""
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    logits = cast(jax.Array, Decoder(CONFIG).apply(half, tokens[:, :-1]))
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def windows(data: jax.Array, starts: jax.Array, seq_len: int) -> jax.Array:
    """Cuts windows [len(starts), seq_len + 1] out of a flat array of token ids."""
    return data[starts[:, None] + jnp.arange(seq_len + 1)].astype(jnp.int32)


def learning_rate(step: jax.Array, total: jax.Array, settings: Settings) -> jax.Array:
    """Linear warmup, then a cosine to zero at step `total`."""
    warmup = jnp.minimum(1.0, (step + 1) / settings.warmup_steps)
    return settings.peak_lr * warmup * 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(1.0, step / total)))


@partial(jax.jit, static_argnames="settings", donate_argnums=0)
def train_step(
    state: State, data: jax.Array, starts: jax.Array, total: jax.Array, decay: jax.Array, settings: Settings
) -> tuple[State, jax.Array]:
    """One AdamW step on the windows that begin at `starts`; norms are not decayed."""
    loss, gradients = jax.value_and_grad(loss_fn)(state.params, windows(data, starts, settings.seq_len))
    updates, adam = ADAM.update(gradients, state.adam)
    rate = learning_rate(state.step, total, settings)
    params = jax.tree.map(lambda p, u: p - rate * (u + (decay * p if p.ndim == 2 else 0.0)), state.params, updates)
    return State(params, adam, state.step + 1), loss


@partial(jax.jit, static_argnames="seq_len")
def evaluate(params: Params, data: jax.Array, seq_len: int) -> jax.Array:
    """Mean loss over all whole windows of `data`, side by side; what is left at the end is not read."""
    starts = jnp.arange(0, len(data) - seq_len, seq_len)
    return jax.lax.map(lambda start: loss_fn(params, windows(data, start[None], seq_len)), starts).mean()


def batches(length: int, settings: Settings) -> Iterator[np.ndarray]:
    """Yields window starts [batch] for ever: each epoch shifts the windows by a random offset and shuffles them."""
    rng = np.random.default_rng(settings.seed)
    while True:
        shift = int(rng.integers(settings.seq_len))
        count = (length - shift - 1) // settings.seq_len
        starts = (rng.permutation(count) * settings.seq_len + shift).astype(np.int32)
        whole = count // settings.batch_size * settings.batch_size
        yield from starts[:whole].reshape(-1, settings.batch_size)
