"""The optimizer's loop, and the state that it can be taken up from."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flashsvd_jax.checkpoint.work_folder import WorkFolder
from flashsvd_jax.config import ModelConfig
from flashsvd_jax.errors import CheckpointError, MissingExtraError, RequestError
from flashsvd_jax.finetune.objective import mean_loss
from flashsvd_jax.finetune.settings import Settings
from flashsvd_jax.finetune.text_windows import TextWindows
from flashsvd_jax.finetune.trained import Arrays
from flashsvd_jax.progress import progress_bar

try:
    import optax
except ImportError as error:
    raise MissingExtraError("fine-tuning", "optax", "train") from error

_ADAM = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b1=0.9, b2=0.95))
_STATE = "state"
_LOOK_EVERY = 10  # steps between looks at the loss, which wait for the device


class State(NamedTuple):
    """After some steps.

    Attributes:
      trained: float32, see `flashsvd_jax.finetune.trained`.
      optimizer: Adam's moments and count.
      losses: of every step so far.
    """

    trained: Arrays
    optimizer: optax.OptState
    losses: list[float]


def train(
    config: ModelConfig,
    trained: Arrays,
    frozen: Arrays,
    windows: TextWindows,
    settings: Settings,
    work: WorkFolder | None = None,
    progress: bool = True,
) -> State:
    """Runs all steps, or those that are left of a run whose state ``work`` has.

    Raises:
      RequestError: the loss is not finite.
      CheckpointError: the kept state is damaged.
    """
    state = State(trained, _ADAM.init(trained), [])
    rates, dtype = _rates(settings), jnp.dtype(settings.dtype)
    if work is not None:
        state = _restored(work, state)
    recent: list[jax.Array] = []
    with progress_bar("training", settings.steps, " steps", progress) as bar:
        bar.update(len(state.losses))
        for number in range(len(state.losses), settings.steps):
            trained, moments, loss = _step(config, dtype, *state[:2], frozen, windows.batch(number), rates(number))
            recent.append(loss)
            state = State(trained, moments, state.losses)
            bar.update()
            done, save = number + 1, (number + 1) % settings.save_every == 0 and work is not None
            if done % _LOOK_EVERY == 0 or done == settings.steps or save:
                state.losses.extend(map(float, recent))
                recent.clear()
                bar.set_postfix_str(f"loss {np.mean(state.losses[-_LOOK_EVERY:]):.4f}")
                _check(state.losses)
            if save:
                _save(work, state)
    return state


def _rates(settings: Settings) -> optax.Schedule:
    """The learning rate of each step."""
    warmup = max(1, settings.steps // 20)
    start = settings.lr / warmup  # so that the first step is one, too
    return optax.warmup_cosine_decay_schedule(start, settings.lr, warmup, max(settings.steps, warmup + 1))


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def _step(
    config: ModelConfig, dtype: jnp.dtype, trained: Arrays, moments: optax.OptState, frozen: Arrays,
    tokens: jax.Array, rate: jax.Array,
) -> tuple[Arrays, optax.OptState, jax.Array]:  # fmt: skip
    loss, gradients = jax.value_and_grad(partial(mean_loss, config))(trained, frozen, tokens, dtype)
    updates: Any
    updates, moments = _ADAM.update(gradients, moments)
    return {name: array - rate * updates[name] for name, array in trained.items()}, moments, loss


def _check(losses: list[float]) -> None:
    wrong = next((number for number, loss in enumerate(losses, 1) if not np.isfinite(loss)), None)
    if wrong is not None:
        raise RequestError(f"the loss is not finite at step {wrong}: lower lr, or choose dtype float32")


def _save(work: WorkFolder | None, state: State) -> None:
    assert work is not None
    leaves = jax.tree.leaves((state.trained, state.optimizer))
    arrays = {str(number): np.asarray(leaf) for number, leaf in enumerate(leaves)}
    work.save(_STATE, arrays | {"losses": np.array(state.losses, np.float64)})


def _restored(work: WorkFolder, fresh: State) -> State:
    """The kept state, or the fresh one where there is none."""
    kept: Mapping[str, np.ndarray] | None = work.load(_STATE)
    if kept is None:
        return fresh
    leaves, structure = jax.tree.flatten((fresh.trained, fresh.optimizer))
    found = [kept.get(str(number)) for number in range(len(leaves))]
    shapes = [None if array is None else array.shape for array in found]
    if "losses" not in kept or shapes != [leaf.shape for leaf in leaves]:
        raise CheckpointError(f"{work.path} does not hold a state of this training; delete it to begin anew")
    trained, optimizer = jax.tree.unflatten(structure, map(jnp.asarray, found))
    return State(trained, optimizer, kept["losses"].tolist())
