"""From a dense model's folder to a compressed one, layer by layer."""

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from flashsvd_jax import __version__
from flashsvd_jax.checkpoint import FolderWriter, Manifest, ModelFolder, WeightWarning, open_folder
from flashsvd_jax.checkpoint.layout import companion_files
from flashsvd_jax.checkpoint.manifest import DTYPES
from flashsvd_jax.checkpoint.work_folder import WorkFolder, content_digest
from flashsvd_jax.compress.allocation import SENSITIVITY_RATIOS
from flashsvd_jax.compress.calibration import Calibration
from flashsvd_jax.compress.factors import Loss, factorize, gains, refit
from flashsvd_jax.compress.fisher import fisher_statistics
from flashsvd_jax.compress.layer_statistics import LayerPass
from flashsvd_jax.compress.methods import Statistic, Statistics, method_named
from flashsvd_jax.compress.ranks import choose_ranks
from flashsvd_jax.compress.recipe import Recipe
from flashsvd_jax.compress.sensitivity import SENSITIVITY_WINDOWS, Sensitivity
from flashsvd_jax.config import ModelConfig
from flashsvd_jax.errors import CheckpointError, RequestError
from flashsvd_jax.factorization import Factorization
from flashsvd_jax.progress import progress_bar
from flashsvd_jax.schema import count_params, schema
from flashsvd_jax.shapes import layer_sites, uniform_rank
from flashsvd_jax.tokenizer import Tokenizer


def compress(
    src: str | Path,
    dst: str | Path,
    recipe: Recipe,
    calibration: Calibration | None = None,
    *,
    dtype: str | None = None,
    resume: bool = False,
    progress: bool = True,
) -> None:
    """Compresses a dense decoder; the folder appears whole at ``dst``, or after an error not at all.

    In memory are the weights and statistics of one layer, a file of the result, and the residual stream of the calibration text,
    float32 [samples, length, embed]; twice that with an update. FWSVD has the whole model and its gradients on the device, ranks by
    sensitivity the whole model.

    Args:
      src: the dense model, a folder in this project's layout.
      dst: the folder to make.
      recipe: how.
      calibration: the text, which everything but method "svd" with uniform or given ranks reads.
      dtype: of the stored arrays; that of ``src`` if not given.
      resume: keep finished layers in a hidden folder beside ``dst`` until all are done, and go on from those that an interrupted
        call with the same arguments left there.
      progress: show bars for what takes longer than two seconds.

    Raises:
      RequestError: the text does not suffice, the target does not, or the model is an encoder or factorized already.
      CheckpointError: ``src`` is damaged or not finite, ``dst`` exists or cannot be written, or what is to be resumed is of
        another model, recipe or text.
    """
    if os.path.lexists(dst):
        raise CheckpointError(f"{dst} already exists; delete it or choose another destination")
    if dtype is not None and dtype not in DTYPES:
        raise RequestError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    with open_folder(src) as folder, warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("error", WeightWarning)  # of no use to anybody, so nothing is written
        stored = dtype or folder.manifest.dtype
        run = _Run(folder, _dense_decoder(folder), recipe, calibration, jnp.dtype(stored), progress)
        if resume:
            dst = Path(dst)
            what = _what(folder, recipe, calibration, stored)
            run.work = stack.enter_context(WorkFolder(dst.with_name(f".{dst.name}.resume"), what))
        factorization = Factorization.of(run.ranks())
        manifest = _manifest(folder, recipe, calibration, factorization, stored)
        try:
            with FolderWriter(dst, folder.hf_config, manifest, copy_files=companion_files(folder.path)) as writer:
                run.write(writer, factorization)
        except WeightWarning as warning:
            raise CheckpointError(f"{warning}; nothing was written: choose a dtype of a wider range") from warning
        if run.work is not None:
            run.work.remove()


class _Run:
    """One folder being compressed. ``work`` is where finished layers are kept, if they are."""

    work: WorkFolder | None = None

    def __init__(
        self, folder: ModelFolder, config: ModelConfig, recipe: Recipe, calibration: Calibration | None,
        dtype: np.dtype, progress: bool,
    ):  # fmt: skip
        self._folder, self._config, self._recipe, self._progress = folder, config, recipe, progress
        self._dtype = dtype
        self._method = method_named(recipe.method)
        self._sites = layer_sites(config)
        self._tokens = np.zeros((0, 0), np.int32)
        self._fisher: dict[str, Statistics] = {}
        if recipe.reads_text:
            if calibration is None:
                raise RequestError(f"{recipe.why_text} needs a calibration text")
            self._tokens = calibration.windows(Tokenizer(folder.path), config)

    def ranks(self) -> dict[str, int]:
        """Ranks by site; those that stay dense are not there. What they need to be known takes a pass over the dense model."""
        self._measure_fisher()
        found = self.work and self.work.load_json("ranks")
        if found is None:
            found = choose_ranks(self._recipe, self._config, self._dtype.itemsize, self._gains, self._sensitivity)
            if self.work is not None:
                self.work.save_json("ranks", found)
        return found

    def write(self, writer: FolderWriter, factorization: Factorization) -> None:
        """Adds every array of the compressed model."""
        replaced = {f"{site.name}.weight" for site in self._sites}
        for name in schema(self._config).keys() - replaced:
            writer.add(name, self._folder.get(name))
        stream = self._stream(self._method.needs)
        updated = self._stream("moment") if self._recipe.update else None
        with progress_bar("compressing", self._config.num_layers, " layers", self._progress) as bar:
            for index in range(self._config.num_layers):
                arrays = self.work and self.work.load(f"layer_{index}")
                moved = arrays is None and not self._method.sequential  # already, with the statistics
                if arrays is None:
                    arrays = self._compressed(index, stream, updated, factorization)
                    if self.work is not None:
                        self.work.save(f"layer_{index}", arrays)
                self._add(writer, index, arrays)
                if index + 1 < self._config.num_layers:
                    if stream is not None and not moved:
                        self._advance(stream, index, arrays if self._method.sequential else {})
                    if updated is not None:
                        self._advance(updated, index, arrays)
                bar.update()

    def _compressed(
        self, index: int, stream: LayerPass | None, updated: LayerPass | None, factorization: Factorization
    ) -> dict[str, np.ndarray]:
        """The factors of a layer by their flat names, as they are stored."""
        moments = {} if updated is None else updated.statistics(index, self._folder.get)
        arrays = {}
        for site, loss in self._losses(index, stream, advance=not self._method.sequential).items():
            rank = factorization.rank(site)
            if rank is None:
                continue
            weight = self._weight(site)
            with np.errstate(over="ignore", invalid="ignore"):  # the writer says which arrays are not finite
                factors = factorize(weight, rank, loss)
                down = factors.down.astype(self._dtype)
                moment = moments[site].moment if moments else None
                if moment is not None:
                    factors = refit(weight, factors._replace(down=down), moment)
                arrays |= {f"{site}.down": down, f"{site}.up": factors.up.astype(self._dtype)}
        return arrays

    def _add(self, writer: FolderWriter, index: int, arrays: dict[str, np.ndarray]) -> None:
        """Writes a layer's factors, and its weights that stay dense."""
        for name, array in arrays.items():
            writer.add(name, array)
        for site in self._layer(index):
            if f"{site}.down" not in arrays:
                writer.add(f"{site}.weight", self._weight(site))

    def _advance(self, stream: LayerPass, index: int, arrays: dict[str, np.ndarray]) -> None:
        """Moves a stream on through a layer with those factors in place of the weights they stand for."""

        def get(name: str) -> np.ndarray:
            site = name.removesuffix(".weight")
            if f"{site}.down" not in arrays:
                return self._folder.get(name)
            return arrays[f"{site}.up"].astype(np.float32) @ arrays[f"{site}.down"].astype(np.float32)

        stream.advance(index, get)

    def _gains(self) -> dict[str, np.ndarray]:
        """What each further rank takes off the loss of each site, in the dense model.

        For ranks by Fisher information, losses are scaled such that what errors of a site's entries count is, in sum, the Fisher
        information of the site: then a loss is, but for one factor, what the model's own loss rises by, to second order.
        """
        found: dict[str, np.ndarray] = {}
        stream = self._stream(self._method.needs)
        for index in self._pass("choosing ranks"):
            for site, loss in self._losses(index, stream, advance=True).items():
                weight = self._weight(site)
                found[site] = gains(weight, loss)
                if self._recipe.alloc == "fisher":
                    information = self._fisher[site].fisher
                    assert information is not None
                    found[site] *= information.sum() / (loss.trace(*weight.shape) or 1.0)
        return found

    def _sensitivity(self) -> dict[str, list[float]]:
        """The model's loss with each site alone compressed at each of `SENSITIVITY_RATIOS`, on the first windows of the text."""
        by_name = {site.name: site for site in self._sites}
        found: dict[str, list[float]] = {}
        stream = self._stream(self._method.needs)
        model = Sensitivity(self._config, self._folder.get, self._tokens[:SENSITIVITY_WINDOWS])
        for index in self._pass("measuring sensitivity"):
            for site, loss in self._losses(index, stream, advance=True).items():
                ranks = [uniform_rank(by_name[site], ratio) for ratio in SENSITIVITY_RATIOS]
                up, down = factorize(
                    self._weight(site), ranks[-1], loss
                )  # the first components are the factors of lower ranks
                found[site] = [model.loss(index, {f"{site}.weight": up[:, :rank] @ down[:rank]}) for rank in ranks]
            model.advance(index)
        return found

    def _pass(self, what: str) -> Iterator[int]:
        """The layers in order, with a bar."""
        with progress_bar(what, self._config.num_layers, " layers", self._progress) as bar:
            for index in range(self._config.num_layers):
                yield index
                bar.update()

    def _measure_fisher(self) -> None:
        if self._method.needs != "fisher" and self._recipe.alloc != "fisher":
            return
        kept = self.work and self.work.load("fisher")
        if kept is None:
            names = [site.name for site in self._sites]
            self._fisher = fisher_statistics(self._config, self._folder.get, names, self._tokens, self._progress)
            if self.work is not None:
                rows = {name: found.fisher for name, found in self._fisher.items() if found.fisher is not None}
                self.work.save("fisher", rows)
        else:
            self._fisher = {name: Statistics(fisher=rows) for name, rows in kept.items()}

    def _stream(self, kind: Statistic | None) -> LayerPass | None:
        """The start of a pass over the layers that measures their inputs, where that is what is asked for."""
        if kind not in ("moment", "magnitude"):
            return None
        return LayerPass(self._config, self._tokens, self._folder.get("embed_tokens.weight"), kind)

    def _losses(self, index: int, stream: LayerPass | None, advance: bool) -> dict[str, Loss]:
        """The loss of each site of a layer; sites that read the same inputs have the same one.

        ``advance`` moves the stream on through the layer as it is, too.
        """
        found = self._fisher if stream is None else stream.statistics(index, self._folder.get, advance)
        statistics = {name: found.get(name, Statistics()) for name in self._layer(index)}
        losses = {id(s): self._method.loss(s, self._recipe.alpha) for s in statistics.values()}
        return {name: losses[id(s)] for name, s in statistics.items()}

    def _layer(self, index: int) -> list[str]:
        return [site.name for site in self._sites if site.name.startswith(f"layers_{index}.")]

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
    read = recipe.reads_text and calibration is not None
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


def _what(folder: ModelFolder, recipe: Recipe, calibration: Calibration | None, dtype: str) -> dict[str, Any]:
    """All that the finished layers depend on, for those who come back to them."""
    return {
        "version": __version__,
        "model": content_digest(folder.path),
        "recipe": dataclasses.asdict(recipe),
        "text": str(calibration) if recipe.reads_text else None,
        "dtype": dtype,
    }
