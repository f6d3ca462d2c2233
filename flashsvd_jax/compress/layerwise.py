"""A dense model's layers one after the other: what is measured of them, their ranks, their factors."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from flashsvd_jax.any_config import AnyConfig
from flashsvd_jax.checkpoint import FolderWriter, ModelFolder
from flashsvd_jax.checkpoint.work_folder import WorkFolder
from flashsvd_jax.compress.allocation import SENSITIVITY_RATIOS
from flashsvd_jax.compress.calibration import Calibration
from flashsvd_jax.compress.factors import Factors, Loss, factorize
from flashsvd_jax.compress.fisher import fisher_statistics
from flashsvd_jax.compress.heads import factorize_groups, gains_of_groups, head_groups, multiplied, refit_groups
from flashsvd_jax.compress.layer_statistics import LayerPass
from flashsvd_jax.compress.methods import Statistic, Statistics, method_named
from flashsvd_jax.compress.ranks import choose_ranks
from flashsvd_jax.compress.recipe import Recipe
from flashsvd_jax.compress.sensitivity import SENSITIVITY_WINDOWS, Sensitivity
from flashsvd_jax.compress.shared_bases import bases_of, layer_blocks, shared_names, summed
from flashsvd_jax.config import ModelConfig
from flashsvd_jax.errors import CheckpointError, RequestError
from flashsvd_jax.factorization import Factorization
from flashsvd_jax.progress import progress_bar
from flashsvd_jax.schema import schema
from flashsvd_jax.shapes import layer_sites, uniform_rank
from flashsvd_jax.tokenizer import Tokenizer


class LayerwiseCompression:
    """One folder being compressed.

    Attributes:
      work: where finished layers, ranks and Fisher information are kept, if they are.

    Args:
      folder: the dense model.
      config: of it.
      recipe: how, settled for this model.
      calibration: the text, for recipes that read one.
      dtype: of the stored arrays.
      progress: show bars for what takes longer than two seconds.

    Raises:
      RequestError: there is no text where one is needed, or it does not suffice.
    """

    work: WorkFolder | None = None

    def __init__(
        self, folder: ModelFolder, config: AnyConfig, recipe: Recipe, calibration: Calibration | None,
        dtype: np.dtype, progress: bool,
    ):  # fmt: skip
        self._folder, self._config, self._recipe, self._progress = folder, config, recipe, progress
        self._dtype = dtype
        self._method = method_named(recipe.method)
        self._sites = layer_sites(config)
        self._groups = head_groups(config, recipe.heads)
        self._bases = bases_of(config, recipe.layers_per_basis or 1)
        self._first = {name: first for first, members in self._bases.items() for name in members}
        self._blocks = layer_blocks(config.num_layers, recipe.layers_per_basis or 1)
        self._tokens = np.zeros((0, 0), np.int32)
        self._fisher: dict[str, Statistics] = {}
        if recipe.reads_text:
            if calibration is None:
                raise RequestError(f"{recipe.why_text} needs a calibration text")
            self._tokens = calibration.windows(Tokenizer(folder.path), config)

    def factorization(self) -> Factorization:
        """Which sites become low rank. What their ranks need to be known takes a pass over the dense model."""
        self._measure_fisher()
        found = self.work and self.work.load_json("ranks")
        if found is None:
            found = choose_ranks(self._recipe, self._config, self._dtype.itemsize, self._gains, self._sensitivity)
            if self.work is not None:
                self.work.save_json("ranks", found)
        ranks = {name: rank for first, rank in found.items() for name in self._bases[first]}
        groups = {site: number for site, number in self._groups.items() if site in ranks}
        return Factorization.of(ranks, shared_names(found, self._bases), groups)

    def write(self, writer: FolderWriter, factorization: Factorization) -> None:
        """Adds every array of the compressed model."""
        replaced = {f"{site.name}.weight" for site in self._sites}
        for name in schema(self._config).keys() - replaced:
            writer.add(name, self._folder.get(name))
        stream = self._stream(self._method.needs)
        updated = self._stream("moment") if self._recipe.update else None
        with progress_bar("compressing", self._config.num_layers, " layers", self._progress) as bar:
            for block in self._blocks:
                part = f"layer_{block.start}"
                arrays = self.work and self.work.load(part)
                moved = arrays is None and not self._method.sequential  # already, with the statistics
                if arrays is None:
                    arrays = self._compressed(block, stream, updated, factorization)
                    if self.work is not None:
                        self.work.save(part, arrays)
                elif updated is not None:
                    self._advance(updated, block, arrays)
                self._add(writer, block, arrays)
                if stream is not None and not moved:
                    self._advance(stream, block, arrays if self._method.sequential else {})
                bar.update(len(block))

    def _compressed(
        self, block: range, stream: LayerPass | None, updated: LayerPass | None, factorization: Factorization
    ) -> dict[str, np.ndarray]:
        """The factors of a block of layers by their flat names, as they are stored; ``updated`` moves on through it."""
        arrays, up_dtype = {}, self._dtype if updated is None else np.float64
        for site, loss in self._losses(block, stream, advance=not self._method.sequential):
            rank = factorization.rank(site)
            if rank is None:
                continue
            members = self._bases[site]
            with _writer_tells():
                up, down = factorize_groups(self._weight(members), rank, loss, self._groups.get(site, 1))
                arrays[f"{site}.down"] = down.astype(self._dtype)
                arrays |= {
                    f"{name}.up": part.astype(up_dtype)
                    for name, part in zip(
                        members, np.split(up, len(members)) if len(members) > 1 else [up], strict=True
                    )
                }
        if updated is not None:
            self._update(block, updated, arrays)
        return arrays

    def _update(self, block: range, updated: LayerPass, arrays: dict[str, np.ndarray]) -> None:
        """Fits second factors, given in float64, to the inputs that the layers before give as they are compressed."""
        for index in block:
            moments = updated.statistics(index, self._folder.get)
            for site in self._layer(index):
                up = arrays.get(f"{site}.up")
                moment = moments[site].moment
                if up is None or moment is None:
                    continue
                factors = Factors(up, arrays[self._down(site)])
                with _writer_tells():
                    arrays[f"{site}.up"] = refit_groups(self._weight([site]), factors, moment).up.astype(self._dtype)
            self._advance(updated, range(index, index + 1), arrays)

    def _add(self, writer: FolderWriter, block: range, arrays: dict[str, np.ndarray]) -> None:
        """Writes the factors of a block of layers, and its weights that stay dense."""
        for name, array in arrays.items():
            writer.add(name, array)
        for site in (site for index in block for site in self._layer(index)):
            if f"{site}.up" not in arrays:
                writer.add(f"{site}.weight", self._weight([site]))

    def _advance(self, stream: LayerPass, block: range, arrays: dict[str, np.ndarray]) -> None:
        """Moves a stream on through layers with those factors in place of the weights they stand for; not beyond the last one."""

        def get(name: str) -> np.ndarray:
            site = name.removesuffix(".weight")
            if f"{site}.up" not in arrays:
                return self._folder.get(name)
            return multiplied(arrays[f"{site}.up"], arrays[self._down(site)])

        for index in block:
            if index + 1 < self._config.num_layers:
                stream.advance(index, get)

    def _gains(self) -> dict[str, np.ndarray]:
        """What each further rank takes off the loss of each site, in the dense model.

        For ranks by Fisher information, losses are scaled such that what errors of a site's entries count is, in sum, the Fisher
        information of the site: then a loss is, but for one factor, what the model's own loss rises by, to second order.
        """
        found: dict[str, np.ndarray] = {}
        stream = self._stream(self._method.needs)
        for block in self._pass("choosing ranks"):
            for site, loss in self._losses(block, stream, advance=True):
                weight = self._weight(self._bases[site])
                found[site] = gains_of_groups(weight, loss, self._groups.get(site, 1))
                if self._recipe.alloc == "fisher":
                    rows = (self._fisher[name].fisher for name in self._bases[site])
                    information = sum(float(of_site.sum()) for of_site in rows if of_site is not None)
                    found[site] *= information / (loss.trace(*weight.shape) or 1.0)
        return found

    def _sensitivity(self) -> dict[str, list[float]]:
        """The model's loss with each site alone compressed at each of `SENSITIVITY_RATIOS`, on the first windows of the text."""
        by_name = {site.name: site for site in self._sites}
        found: dict[str, list[float]] = {}
        assert isinstance(self._config, ModelConfig)  # an encoder has no loss of its own
        stream = self._stream(self._method.needs)
        model = Sensitivity(self._config, self._folder.get, self._tokens[:SENSITIVITY_WINDOWS])
        for (index,) in self._pass("measuring sensitivity"):  # a basis of several layers has none
            for site, loss in self._losses(range(index, index + 1), stream, advance=True):
                ranks = [uniform_rank(by_name[site], ratio) for ratio in SENSITIVITY_RATIOS]
                up, down = factorize(
                    self._weight([site]), ranks[-1], loss
                )  # the first components are the factors of lower ranks
                found[site] = [model.loss(index, {f"{site}.weight": up[:, :rank] @ down[:rank]}) for rank in ranks]
            model.advance(index)
        return found

    def _pass(self, what: str) -> Iterator[range]:
        """The blocks of layers in order, with a bar."""
        with progress_bar(what, self._config.num_layers, " layers", self._progress) as bar:
            for block in self._blocks:
                yield block
                bar.update(len(block))

    def _measure_fisher(self) -> None:
        if self._method.needs != "fisher" and self._recipe.alloc != "fisher":
            return
        kept = self.work and self.work.load("fisher")
        if kept is None:
            assert isinstance(self._config, ModelConfig)  # as above
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
        return LayerPass(self._config, self._tokens, self._folder.get, kind)

    def _losses(self, block: range, stream: LayerPass | None, advance: bool) -> Iterator[tuple[str, Loss]]:
        """The loss of each first factor of a block of layers, by its first site and as soon as it is known.

        Sites that read the same inputs have the same loss. ``advance`` moves the stream on through the layers as they are, too.
        """
        in_common: dict[str, Statistics] = {}
        for index in block:
            found = self._fisher if stream is None else stream.statistics(index, self._folder.get, advance)
            statistics = {name: found.get(name, Statistics()) for name in self._layer(index)}
            alone = {name: s for name, s in statistics.items() if self._bases.get(name) == (name,)}
            yield from self._losses_of(alone)
            first = {self._first[name]: s for name, s in statistics.items() if name not in alone}
            in_common = summed(in_common, first)
        yield from self._losses_of(in_common)

    def _losses_of(self, statistics: Mapping[str, Statistics]) -> Iterator[tuple[str, Loss]]:
        losses = {id(s): self._method.loss(s, self._recipe.alpha) for s in statistics.values()}
        return ((name, losses[id(s)]) for name, s in statistics.items())

    def _down(self, site: str) -> str:
        """The name that a site's first factor is stored under."""
        return f"{self._first[site]}.down"

    def _layer(self, index: int) -> list[str]:
        return [site.name for site in self._sites if site.name.startswith(f"layers_{index}.")]

    def _weight(self, sites: Sequence[str]) -> np.ndarray:
        """The weight of a site, or those of several below each other, float32."""
        weights = [self._folder.get(f"{site}.weight").astype(np.float32) for site in sites]
        for site, weight in zip(sites, weights, strict=True):
            if not np.isfinite(weight).all():
                raise CheckpointError(
                    f"{self._folder.path}: {site}.weight holds NaN or infinity and cannot be compressed"
                )
        return np.concatenate(weights) if len(weights) > 1 else weights[0]


def _writer_tells() -> np.errstate:
    """Overflow is no matter here: the writer says which arrays are not finite."""
    return np.errstate(over="ignore", invalid="ignore")
