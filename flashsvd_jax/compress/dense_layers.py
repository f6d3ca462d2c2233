"""The layers of a dense model that is being compressed: weights, what errors in them count, and what ranks are chosen by."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from flashsvd_jax.any_config import AnyConfig
from flashsvd_jax.checkpoint import ModelFolder
from flashsvd_jax.checkpoint.work_folder import WorkFolder
from flashsvd_jax.compress.allocation import SENSITIVITY_RATIOS
from flashsvd_jax.compress.calibration import Calibration
from flashsvd_jax.compress.factors import Loss, factorize
from flashsvd_jax.compress.fisher import fisher_statistics
from flashsvd_jax.compress.heads import gains_of_groups, head_groups
from flashsvd_jax.compress.layer_statistics import AlignedPass, LayerPass
from flashsvd_jax.compress.learned_ranks import Components, learned_shares
from flashsvd_jax.compress.methods import Statistic, Statistics, method_named
from flashsvd_jax.compress.recipe import Recipe
from flashsvd_jax.compress.sensitivity import SENSITIVITY_WINDOWS, Sensitivity
from flashsvd_jax.compress.shared_bases import bases_of, layer_blocks, summed
from flashsvd_jax.config import ModelConfig
from flashsvd_jax.errors import CheckpointError, RequestError
from flashsvd_jax.progress import progress_bar
from flashsvd_jax.shapes import layer_sites, uniform_rank
from flashsvd_jax.tokenizer import Tokenizer


class DenseLayers:
    """What is measured of them, by a recipe's method.

    Attributes:
      method: the recipe's.
      groups: heads by site, where they have factors of their own.
      bases: which sites have one first factor, by the first of them.
      blocks: the layers, those together that share bases.

    Args:
      folder: the dense model.
      config: of it.
      recipe: how it is compressed, settled for this model.
      calibration: the text, for recipes that read one.
      progress: show bars for what takes longer than two seconds.

    Raises:
      RequestError: there is no text where one is needed, or it does not suffice.
    """

    def __init__(
        self, folder: ModelFolder, config: AnyConfig, recipe: Recipe, calibration: Calibration | None, progress: bool
    ):
        self._folder, self._config, self._recipe, self._progress = folder, config, recipe, progress
        self.method = method_named(recipe.method)
        self.groups = head_groups(config, recipe.heads)
        self.bases = bases_of(config, recipe.layers_per_basis or 1)
        self.blocks = layer_blocks(config.num_layers, recipe.layers_per_basis or 1)
        self._first = {name: first for first, members in self.bases.items() for name in members}
        self._sites = {site.name: site for site in layer_sites(config)}
        self._tokens = np.zeros((0, 0), np.int32)
        self._fisher: dict[str, Statistics] = {}
        if recipe.reads_text:
            if calibration is None:
                raise RequestError(f"{recipe.why_text} needs a calibration text")
            self._tokens = calibration.windows(Tokenizer(folder.path), config)

    def sites(self, index: int) -> list[str]:
        """The projections of a layer."""
        return [name for name in self._sites if name.startswith(f"layers_{index}.")]

    def down(self, site: str) -> str:
        """The name that a site's first factor is stored under."""
        return f"{self._first[site]}.down"

    def weight(self, sites: Sequence[str]) -> np.ndarray:
        """The weight of a site, or those of several below each other, float32."""
        weights = [self._folder.get(f"{site}.weight").astype(np.float32) for site in sites]
        for site, weight in zip(sites, weights, strict=True):
            if not np.isfinite(weight).all():
                raise CheckpointError(
                    f"{self._folder.path}: {site}.weight holds NaN or infinity and cannot be compressed"
                )
        return np.concatenate(weights) if len(weights) > 1 else weights[0]

    def measure_fisher(self, work: WorkFolder | None) -> None:
        """Takes Fisher information, if the recipe needs it, from what is kept in ``work``, or measures it and keeps it there."""
        if self.method.needs != "fisher" and self._recipe.alloc != "fisher":
            return
        kept = work and work.load("fisher")
        if kept is None:
            assert isinstance(self._config, ModelConfig)  # an encoder has no loss of its own
            names = list(self._sites)
            self._fisher = fisher_statistics(self._config, self._folder.get, names, self._tokens, self._progress)
            if work is not None:
                rows = {name: found.fisher for name, found in self._fisher.items() if found.fisher is not None}
                work.save("fisher", rows)
        else:
            self._fisher = {name: Statistics(fisher=rows) for name, rows in kept.items()}

    def stream(self, kind: Statistic | None, compressed: bool = False) -> LayerPass | None:
        """The start of a pass over the layers, dense or as they are ``compressed``, that measures their inputs, where that is what
        is asked for."""
        if kind not in ("moment", "magnitude"):
            return None
        if compressed and self.method.aligned:
            return AlignedPass(self._config, self._tokens, self._folder.get)
        return LayerPass(self._config, self._tokens, self._folder.get, kind)

    def losses(self, block: range, stream: LayerPass | None, advance: bool) -> Iterator[tuple[str, Loss]]:
        """The loss of each first factor of a block of layers, by its first site and as soon as it is known.

        Sites that read the same inputs have the same loss. ``advance`` moves the stream on through the layers as they are, too.
        """
        in_common: dict[str, Statistics] = {}
        for index in block:
            found = self._fisher if stream is None else stream.statistics(index, self._folder.get, advance)
            statistics = {name: found.get(name, Statistics()) for name in self.sites(index)}
            alone = {name: s for name, s in statistics.items() if self.bases.get(name) == (name,)}
            yield from self._losses_of(alone)
            first = {self._first[name]: s for name, s in statistics.items() if name not in alone}
            in_common = summed(in_common, first)
        yield from self._losses_of(in_common)

    def _losses_of(self, statistics: Mapping[str, Statistics]) -> Iterator[tuple[str, Loss]]:
        losses = {id(s): self.method.loss(s, self._recipe.alpha) for s in statistics.values()}
        return ((name, losses[id(s)]) for name, s in statistics.items())

    def gains(self) -> dict[str, np.ndarray]:
        """What each further rank takes off the loss of each site, in the dense model.

        For ranks by Fisher information, losses are scaled such that what errors of a site's entries count is, in sum, the Fisher
        information of the site: then a loss is, but for one factor, what the model's own loss rises by, to second order.
        """
        found: dict[str, np.ndarray] = {}
        stream = self.stream(self.method.needs)
        for block in self._pass("choosing ranks"):
            for site, loss in self.losses(block, stream, advance=True):
                weight = self.weight(self.bases[site])
                found[site] = gains_of_groups(weight, loss, self.groups.get(site, 1))
                if self._recipe.alloc == "fisher":
                    rows = (self._fisher[name].fisher for name in self.bases[site])
                    information = sum(float(of_site.sum()) for of_site in rows if of_site is not None)
                    found[site] *= information / (loss.trace(*weight.shape) or 1.0)
        return found

    def sensitivity(self) -> dict[str, list[float]]:
        """The model's loss with each site alone compressed at each of `SENSITIVITY_RATIOS`, on the first windows of the text."""
        found: dict[str, list[float]] = {}
        assert isinstance(self._config, ModelConfig)  # as above
        stream = self.stream(self.method.needs)
        model = Sensitivity(self._config, self._folder.get, self._tokens[:SENSITIVITY_WINDOWS])
        for (index,) in self._pass("measuring sensitivity"):  # a basis of several layers has none
            for site, loss in self.losses(range(index, index + 1), stream, advance=True):
                ranks = [uniform_rank(self._sites[site], ratio) for ratio in SENSITIVITY_RATIOS]
                # The first components are the factors of lower ranks.
                up, down = factorize(self.weight([site]), ranks[-1], loss)
                found[site] = [model.loss(index, {f"{site}.weight": up[:, :rank] @ down[:rank]}) for rank in ranks]
            model.advance(index)
        return found

    def similarities(self) -> dict[str, float]:
        """How near each site's layer leaves the residual stream to what it was, the mean of those that share a basis."""
        stream = LayerPass(self._config, self._tokens, self._folder.get, None)
        of_layers = [
            stream.similarity(index, self._folder.get) for block in self._pass("choosing ranks") for index in block
        ]
        of_sites = {site: found for index, found in enumerate(of_layers) for site in self.sites(index)}
        return {first: float(np.mean([of_sites[name] for name in names])) for first, names in self.bases.items()}

    def learned_shares(self, ratio: float) -> dict[str, float]:
        """Which share of its parameters each site keeps by `learned_ranks`, that of all together being the ratio."""
        assert isinstance(self._config, ModelConfig)  # as above
        components: dict[str, Components] = {}
        stream = self.stream(self.method.needs)
        for block in self._pass("factors of whole rank"):
            for site, loss in self.losses(block, stream, advance=True):
                weight = self.weight(self.bases[site])
                up, down = factorize(weight, min(weight.shape), loss)
                components[site] = Components(up.astype(np.float32), down.astype(np.float32), self.bases[site])
        return learned_shares(self._config, self._folder.get, components, ratio, self._tokens, self._progress)

    def _pass(self, what: str) -> Iterator[range]:
        """The blocks of layers in order, with a bar."""
        with progress_bar(what, self._config.num_layers, " layers", self._progress) as bar:
            for block in self.blocks:
                yield block
                bar.update(len(block))
