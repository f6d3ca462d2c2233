"""From a dense model's folder to a compressed one, layer by layer."""

import os
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from flashsvd_jax.checkpoint import FolderWriter, Manifest, ModelFolder, WeightWarning, open_folder
from flashsvd_jax.checkpoint.layout import companion_files
from flashsvd_jax.checkpoint.manifest import DTYPES
from flashsvd_jax.compress.allocation import greedy_ranks, uniform_ranks
from flashsvd_jax.compress.calibration import Calibration
from flashsvd_jax.compress.factors import Loss, factorize, gains
from flashsvd_jax.compress.fisher import fisher_statistics
from flashsvd_jax.compress.layer_statistics import LayerPass
from flashsvd_jax.compress.methods import Statistics, method_named
from flashsvd_jax.compress.recipe import Recipe
from flashsvd_jax.config import ModelConfig
from flashsvd_jax.errors import CheckpointError, RequestError
from flashsvd_jax.factorization import Factorization
from flashsvd_jax.progress import progress_bar
from flashsvd_jax.schema import count_params, schema
from flashsvd_jax.shapes import layer_sites
from flashsvd_jax.tokenizer import Tokenizer


def compress(
    src: str | Path,
    dst: str | Path,
    recipe: Recipe,
    calibration: Calibration | None = None,
    *,
    dtype: str | None = None,
    progress: bool = True,
) -> None:
    """Compresses a dense decoder; the folder appears whole at ``dst``, or after an error not at all.

    In memory are the weights and statistics of one layer, a file of the result, and the residual stream of the calibration text,
    float32 [samples, length, embed]. FWSVD has the whole model and its gradients on the device.

    Args:
      src: the dense model, a folder in this project's layout.
      dst: the folder to make.
      recipe: how.
      calibration: the text, which every method but "svd" reads.
      dtype: of the stored arrays; that of ``src`` if not given.
      progress: show bars for what takes longer than two seconds.

    Raises:
      RequestError: the text does not suffice, the ratio does not, or the model is an encoder or factorized already.
      CheckpointError: ``src`` is damaged or not finite, or ``dst`` exists or cannot be written.
    """
    if os.path.lexists(dst):
        raise CheckpointError(f"{dst} already exists; delete it or choose another destination")
    if dtype is not None and dtype not in DTYPES:
        raise RequestError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    with open_folder(src) as folder, warnings.catch_warnings():
        warnings.simplefilter("error", WeightWarning)  # of no use to anybody, so nothing is written
        run = _Run(folder, _dense_decoder(folder), recipe, calibration, progress)
        factorization = Factorization.of(run.ranks())
        manifest = _manifest(folder, recipe, calibration, factorization, dtype or folder.manifest.dtype)
        try:
            with FolderWriter(dst, folder.hf_config, manifest, copy_files=companion_files(folder.path)) as writer:
                run.write(writer, factorization, jnp.dtype(manifest.dtype))
        except WeightWarning as warning:
            raise CheckpointError(f"{warning}; nothing was written: choose a dtype of a wider range") from warning


class _Run:
    """One folder being compressed."""

    def __init__(
        self, folder: ModelFolder, config: ModelConfig, recipe: Recipe, calibration: Calibration | None, progress: bool
    ):
        self._folder, self._config, self._recipe, self._progress = folder, config, recipe, progress
        self._method = method_named(recipe.method)
        self._sites = layer_sites(config)
        self._tokens = np.zeros((0, 0), np.int32)
        if self._method.needs is not None:
            if calibration is None:
                raise RequestError(f"method {recipe.method} needs a calibration text")
            self._tokens = calibration.windows(Tokenizer(folder.path), config)
        self._fisher: dict[str, Statistics] = {}
        if self._method.needs == "fisher":
            names = [site.name for site in self._sites]
            self._fisher = fisher_statistics(config, folder.get, names, self._tokens, progress)

    def ranks(self) -> dict[str, int]:
        """Ranks by site; those that stay dense are not there. Greedy ones take a pass over the dense model."""
        recipe = self._recipe
        if recipe.alloc == "uniform":
            return uniform_ranks(self._sites, recipe.ratio, recipe.multiple)
        found: dict[str, np.ndarray] = {}
        stream = self._stream()
        with progress_bar("choosing ranks", self._config.num_layers, " layers", self._progress) as bar:
            for index in range(self._config.num_layers):
                for site, loss in self._losses(index, stream).items():
                    found[site] = gains(self._weight(site), loss)
                    # Losses of different projections have no unit in common; the shares of them that ranks take off have.
                    found[site] /= found[site].sum() or 1.0
                if stream is not None:
                    stream.advance(index, self._folder.get)
                bar.update()
        return greedy_ranks(self._sites, recipe.ratio, found, recipe.multiple)

    def write(self, writer: FolderWriter, factorization: Factorization, dtype: np.dtype) -> None:
        """Adds every array of the compressed model."""
        replaced = {f"{site.name}.weight" for site in self._sites}
        for name in schema(self._config).keys() - replaced:
            writer.add(name, self._folder.get(name))
        stream = self._stream()
        with progress_bar("compressing", self._config.num_layers, " layers", self._progress) as bar:
            for index in range(self._config.num_layers):
                losses = self._losses(index, stream)
                products = {site: self._add(writer, site, loss, factorization, dtype) for site, loss in losses.items()}
                if stream is not None:
                    self._advance(stream, index, products if self._method.sequential else {})
                bar.update()

    def _add(
        self, writer: FolderWriter, site: str, loss: Loss, factorization: Factorization, dtype: np.dtype
    ) -> np.ndarray:
        """Writes a site, and gives its weight as it is then, float32."""
        weight, rank = self._weight(site), factorization.rank(site)
        if rank is None:
            writer.add(f"{site}.weight", weight)
            return weight
        with np.errstate(over="ignore", invalid="ignore"):  # the writer says which arrays are not finite
            up, down = (factor.astype(dtype) for factor in factorize(weight, rank, loss))
            product = up.astype(np.float32) @ down.astype(np.float32)
        writer.add(f"{site}.up", up)
        writer.add(f"{site}.down", down)
        return product

    def _advance(self, stream: LayerPass, index: int, weights: dict[str, np.ndarray]) -> None:
        def get(name: str) -> np.ndarray:
            weight = weights.get(name.removesuffix(".weight"))
            return self._folder.get(name) if weight is None else weight

        stream.advance(index, get)

    def _stream(self) -> LayerPass | None:
        """The start of a pass over the layers, for methods that measure their inputs."""
        if self._method.needs not in ("moment", "magnitude"):
            return None
        return LayerPass(self._config, self._tokens, self._folder.get("embed_tokens.weight"), self._method.needs)

    def _losses(self, index: int, stream: LayerPass | None) -> dict[str, Loss]:
        """The loss of each site of a layer; sites that read the same inputs have the same one."""
        found = self._fisher if stream is None else stream.statistics(index, self._folder.get)
        names = [site.name for site in self._sites if site.name.startswith(f"layers_{index}.")]
        statistics = {name: found.get(name, Statistics()) for name in names}
        losses = {id(s): self._method.loss(s, self._recipe.alpha) for s in statistics.values()}
        return {name: losses[id(s)] for name, s in statistics.items()}

    def _weight(self, site: str) -> np.ndarray:
        weight = self._folder.get(f"{site}.weight").astype(np.float32)
        if not np.isfinite(weight).all():
            raise CheckpointError(f"{self._folder.path}: {site}.weight holds NaN or infinity and cannot be compressed")
        return weight


def _dense_decoder(folder: ModelFolder) -> ModelConfig:
    config = folder.config
    if not isinstance(config, ModelConfig):
        raise RequestError(f"{folder.path} is an encoder, a {config.model_type}; only decoders can be compressed")
    if config.factorization:
        raise RequestError(
            f"{folder.path} is factorized already ({folder.manifest.family}, {len(config.factorization.ranks)} low-rank sites);"
            " compress the dense model it was made from"
        )
    return config


def _manifest(
    folder: ModelFolder, recipe: Recipe, calibration: Calibration | None, factorization: Factorization, dtype: str
) -> Manifest:
    dense = folder.manifest
    config = type(folder.config).from_hf(folder.hf_config, factorization)
    read = method_named(recipe.method).needs is not None and calibration is not None
    return Manifest(
        family=recipe.method,
        dtype=dtype,
        factorization=factorization,
        params=count_params(config),
        params_dense=count_params(folder.config),
        base_model=dense.base_model,
        sources=dense.sources,
        notes=(*dense.notes, str(recipe), *([str(calibration)] if read else [])),
    )
