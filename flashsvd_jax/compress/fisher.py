"""Fisher information of a dense decoder's projections, summed over the rows of each weight."""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from flashsvd_jax.compress.methods import Statistics
from flashsvd_jax.config import ModelConfig
from flashsvd_jax.models.decoder import full_logits, token_losses
from flashsvd_jax.models.weights import build_weights
from flashsvd_jax.progress import progress_bar
from flashsvd_jax.schema import schema


def fisher_statistics(
    config: ModelConfig, get: Callable[[str], np.ndarray], sites: Sequence[str], tokens: np.ndarray, progress: bool
) -> dict[str, Statistics]:
    """The empirical Fisher information: squared gradients of each window's mean loss, summed over rows and windows.

    The whole model and its gradients are on the device in float32.

    Args:
      config: the dense model.
      get: flat name -> array.
      sites: the projections to measure.
      tokens: int32 [windows, length].
      progress: show a bar when it takes more than two seconds.
    """
    params = {name: jnp.asarray(get(name), jnp.float32) for name in schema(config)}
    measured = {name: params.pop(name) for name in (f"{site}.weight" for site in sites)}

    def loss(measured: Mapping[str, jax.Array], rest: Mapping[str, jax.Array], window: jax.Array) -> jax.Array:
        weights = build_weights(config, {**rest, **measured}.__getitem__)
        logits = full_logits(config, weights, window[None, :-1])[0]
        return token_losses(logits, window[1:]).mean()

    @jax.jit
    def rows(
        measured: Mapping[str, jax.Array], rest: Mapping[str, jax.Array], window: jax.Array
    ) -> dict[str, jax.Array]:
        with jax.default_matmul_precision("highest"):
            gradients = jax.grad(loss)(measured, rest, window)
        return {name: jnp.square(gradient).sum(1) for name, gradient in gradients.items()}

    sums = {name: np.zeros(weight.shape[0]) for name, weight in measured.items()}
    with progress_bar("Fisher information", len(tokens), " windows", progress) as bar:
        for window in tokens:
            for name, found in rows(measured, params, window).items():
                sums[name] += np.asarray(found, np.float64)
            bar.update()
    return {site: Statistics(fisher=sums[f"{site}.weight"]) for site in sites}
