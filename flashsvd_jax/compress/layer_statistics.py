"""What goes into the projections of a model, one layer at a time: its weights and statistics are all that is held of it."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flashsvd_jax.any_config import AnyConfig
from flashsvd_jax.compress.float64 import Array, float64_module
from flashsvd_jax.compress.methods import Statistic, Statistics
from flashsvd_jax.compress.model_layers import ModelLayers, model_layers
from flashsvd_jax.errors import CheckpointError
from flashsvd_jax.length_batches import batch_within_workspace
from flashsvd_jax.models.packing import packed_sites
from pallas_kernels import LayerNorm, Norm, PackedProjection, normed, project


class LayerPass:
    """The residual stream of all windows between two layers of a dense model, float32 in host memory.

    Products are in full float32, whatever the device would take for that by itself; sums over batches in float64, second moments
    on the GPU if there is one.

    Args:
      config: the dense model.
      tokens: int32 [windows, length].
      get: flat name -> array, of what the model embeds tokens by.
      kind: of the statistics to take: "moment" or "magnitude", None for none.
    """

    def __init__(self, config: AnyConfig, tokens: np.ndarray, get: Callable[[str], np.ndarray], kind: Statistic | None):
        self._config, self._kind, self._layers = config, kind, model_layers(config)
        scores = 4 * tokens.shape[1] * max(config.num_heads * tokens.shape[1], config.intermediate_size)
        self._batch = batch_within_workspace(scores, len(tokens))
        self._stream = np.empty((*tokens.shape, config.hidden_size), np.float32)
        embedded = self._layers.embedding(get)
        for start, batch in zip(range(0, len(tokens), self._batch), self._batches(), strict=True):
            batch[:] = embedded(tokens[start : start + self._batch])

    def statistics(self, index: int, get: Callable[[str], np.ndarray], advance: bool = False) -> dict[str, Statistics]:
        """Measures the inputs of a layer's projections.

        Args:
          index: of the layer.
          get: flat name -> array.
          advance: whether the stream moves on through the layer with the same weights; else it stays where it is.

        Returns:
          Statistics by site; sites that read the same inputs have the same object.
        """
        groups = [group for group in packed_sites(self._config) if group[0].startswith(f"layers_{index}.")]
        sums: dict[tuple[str, ...], Array] = {}
        for batch, after, measured in self._measured(index, self._layers.weights(index, get)):
            if advance:
                batch[:] = after
            with float64_module() as xp:
                for group, array in zip(groups, measured, strict=True):
                    if group in sums:
                        sums[group] += xp.asarray(array)  # in place where that can be
                    else:
                        sums[group] = xp.asarray(array, xp.float64)
        found = {group: self._checked(group[0], total) for group, total in sums.items()}
        return {site: found[group] for group in groups for site in group}

    def _measured(self, index: int, weights: Any) -> Iterator[tuple[np.ndarray, jax.Array, Sequence[jax.Array]]]:
        """Each batch of the stream, what it is after the layer, and what was measured of the inputs of each packed projection."""
        kind = self._layers.kind(index)
        for batch in self._batches():
            yield batch, *_measured_layer(self._layers, kind, self._kind, weights, batch)

    def _checked(self, site: str, total: Array) -> Statistics:
        with float64_module() as xp:
            if not xp.isfinite(total).all():
                raise CheckpointError(
                    f"the model is not usable: on the calibration text, inputs of {site} are not finite"
                )
            return self._statistics(total)

    def _statistics(self, total: Array) -> Statistics:
        """The sum over all batches, as what it is."""
        # Only what is large is worth leaving on a GPU.
        return Statistics(moment=total) if self._kind == "moment" else Statistics(magnitude=np.asarray(total))

    def advance(self, index: int, get: Callable[[str], np.ndarray]) -> None:
        """Moves the stream on through a layer with the weights that ``get`` gives, factors multiplied out."""
        weights, kind = self._layers.weights(index, get), self._layers.kind(index)
        for batch in self._batches():
            batch[:] = _measured_layer(self._layers, kind, None, weights, batch)[0]

    def similarity(self, index: int, get: Callable[[str], np.ndarray]) -> float:
        """Moves the stream on, and says how near it stays: the mean over tokens of the cosine of the stream before and after.

        Raises:
          CheckpointError: it does not stay finite.
        """
        weights, kind, total = self._layers.weights(index, get), self._layers.kind(index), 0.0
        for batch in self._batches():
            after = np.asarray(_measured_layer(self._layers, kind, None, weights, batch)[0])
            if not np.isfinite(after).all():
                raise CheckpointError(
                    f"the model is not usable: on the calibration text, layer {index} gives what is not finite"
                )
            sizes = np.linalg.norm(batch, axis=-1) * np.linalg.norm(after, axis=-1)
            total += float(
                ((batch * after).sum(-1) / np.maximum(sizes, np.finfo(np.float32).tiny)).sum(dtype=np.float64)
            )
            batch[:] = after
        return total / self._stream[..., 0].size

    def _batches(self) -> Iterator[np.ndarray]:
        """Views of the stream."""
        for start in range(0, len(self._stream), self._batch):
            yield self._stream[start : start + self._batch]


class AlignedPass(LayerPass):
    """The same for a model whose layers are being compressed, and beside it the dense model's residual stream of the same text.

    Args:
      config: the dense model.
      tokens: int32 [windows, length].
      get: flat name -> array of the dense model.
    """

    def __init__(self, config: AnyConfig, tokens: np.ndarray, get: Callable[[str], np.ndarray]):
        super().__init__(config, tokens, get, "moment")
        self._original, self._dense_get = LayerPass(config, tokens, get, "moment"), get

    def statistics(self, index: int, get: Callable[[str], np.ndarray], advance: bool = False) -> dict[str, Statistics]:
        """Measures them with the same weights in both streams, which stay where they are."""
        assert not advance  # one of them would be left behind
        return super().statistics(index, get)

    def advance(self, index: int, get: Callable[[str], np.ndarray]) -> None:
        """Moves the stream on with the weights that ``get`` gives, the dense model's with its own."""
        super().advance(index, get)
        self._original.advance(index, self._dense_get)

    def _measured(self, index: int, weights: Any) -> Iterator[tuple[np.ndarray, jax.Array, Sequence[jax.Array]]]:
        kind = self._layers.kind(index)
        for batch, original in zip(self._batches(), self._original._batches(), strict=True):
            yield batch, *_compared_layer(self._layers, kind, weights, batch, original)

    def _statistics(self, total: Array) -> Statistics:
        return Statistics(moment=total[0], shift=total[1])


# Large products alone, which cuBLAS serves well untried: to try others took 26 s on an H200 (bench/NOTES.md).
_PLAIN = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


@partial(jax.jit, static_argnums=(0, 1, 2), compiler_options=_PLAIN)
def _measured_layer(
    layers: ModelLayers, layer: Hashable, kind: Statistic | None, weights: Any, x: jax.Array
) -> tuple[jax.Array, Sequence[jax.Array]]:
    """The stream after a layer, and what was measured of the inputs of each packed projection, in their order."""

    def measured(rows: jax.Array) -> list[jax.Array]:
        if kind is None:
            return []
        return [rows.T @ rows if kind == "moment" else jnp.abs(rows).sum(0)]

    with jax.default_matmul_precision("highest"):
        after, found = _through(layers, layer, weights, x, measured)
    return after, [array for of_one in found for array in of_one]


@partial(jax.jit, static_argnums=(0, 1), compiler_options=_PLAIN)
def _compared_layer(
    layers: ModelLayers, layer: Hashable, weights: Any, x: jax.Array, original: jax.Array
) -> tuple[jax.Array, Sequence[jax.Array]]:
    """The stream after a layer, and of each packed projection [2, d_in, d_in]: the second moment of its inputs, and that of how far
    those of the other stream are from them with them. Differences are taken before they are multiplied, or they would be lost."""
    with jax.default_matmul_precision("highest"):
        _, originals = _through(layers, layer, weights, original, lambda rows: rows)
        after, inputs = _through(layers, layer, weights, x, lambda rows: rows)
        pairs = zip(inputs, originals, strict=True)
        return after, [jnp.stack([rows.T @ rows, (others - rows).T @ rows]) for rows, others in pairs]


def _through(
    layers: ModelLayers, layer: Hashable, weights: Any, x: jax.Array, seen: Callable[[jax.Array], Any]
) -> tuple[jax.Array, list[Any]]:
    """The stream after a layer, and what ``seen`` makes of the inputs [tokens, d_in] of each packed projection."""
    found = []

    def product(
        x: jax.Array, packed: PackedProjection, norm: Norm | LayerNorm | None = None, **options: Any
    ) -> tuple[jax.Array, ...]:
        x = x if norm is None else normed(x, norm)
        found.append(seen(x.reshape(-1, x.shape[-1])))
        return project(x, packed, **options)

    return layers.through(layer, weights, x, product), found
