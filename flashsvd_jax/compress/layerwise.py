"""A dense model's layers one after the other, and the factors that are written in their place."""

import numpy as np

from flashsvd_jax.any_config import AnyConfig
from flashsvd_jax.checkpoint import FolderWriter, ModelFolder
from flashsvd_jax.checkpoint.work_folder import WorkFolder
from flashsvd_jax.compress.calibration import Calibration
from flashsvd_jax.compress.dense_layers import DenseLayers
from flashsvd_jax.compress.factors import Factors
from flashsvd_jax.compress.heads import factorize_groups, multiplied, refit_groups
from flashsvd_jax.compress.layer_statistics import LayerPass
from flashsvd_jax.compress.ranks import Measures, choose_ranks
from flashsvd_jax.compress.recipe import Recipe
from flashsvd_jax.compress.shared_bases import shared_names
from flashsvd_jax.factorization import Factorization
from flashsvd_jax.progress import progress_bar
from flashsvd_jax.schema import schema
from flashsvd_jax.shapes import layer_sites


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
        self._dense = DenseLayers(folder, config, recipe, calibration, progress)
        self._sequential = self._dense.method.sequential

    def factorization(self) -> Factorization:
        """Which sites become low rank. What their ranks need to be known takes a pass over the dense model."""
        dense = self._dense
        dense.measure_fisher(self.work)
        found = self.work and self.work.load_json("ranks")
        if found is None:
            measures = Measures(dense.gains, dense.similarities, dense.sensitivity, dense.learned_shares)
            found = choose_ranks(self._recipe, self._config, self._dtype.itemsize, measures)
            if self.work is not None:
                self.work.save_json("ranks", found)
        ranks = {name: rank for first, rank in found.items() for name in dense.bases[first]}
        groups = {site: number for site, number in dense.groups.items() if site in ranks}
        return Factorization.of(ranks, shared_names(found, dense.bases), groups)

    def write(self, writer: FolderWriter, factorization: Factorization) -> None:
        """Adds every array of the compressed model."""
        replaced = {f"{site.name}.weight" for site in layer_sites(self._config)}
        for name in schema(self._config).keys() - replaced:
            writer.add(name, self._folder.get(name))
        stream = self._dense.stream(self._dense.method.needs, self._sequential)
        updated = self._dense.stream("moment") if self._recipe.update else None
        with progress_bar("compressing", self._config.num_layers, " layers", self._progress) as bar:
            for block in self._dense.blocks:
                part = f"layer_{block.start}"
                arrays = self.work and self.work.load(part)
                moved = arrays is None and not self._sequential  # already, with the statistics
                if arrays is None:
                    arrays = self._compressed(block, stream, updated, factorization)
                    if self.work is not None:
                        self.work.save(part, arrays)
                elif updated is not None:
                    self._advance(updated, block, arrays)
                self._add(writer, block, arrays)
                if stream is not None and not moved:
                    self._advance(stream, block, arrays if self._sequential else {})
                bar.update(len(block))

    def _compressed(
        self, block: range, stream: LayerPass | None, updated: LayerPass | None, factorization: Factorization
    ) -> dict[str, np.ndarray]:
        """The factors of a block of layers by their flat names, as they are stored; ``updated`` moves on through it."""
        arrays, up_dtype = {}, self._dtype if updated is None else np.float64
        for site, loss in self._dense.losses(block, stream, advance=not self._sequential):
            rank = factorization.rank(site)
            if rank is None:
                continue
            members = self._dense.bases[site]
            with _writer_tells():
                up, down = factorize_groups(self._dense.weight(members), rank, loss, self._dense.groups.get(site, 1))
                arrays[f"{site}.down"] = down.astype(self._dtype)
                parts = np.split(up, len(members)) if len(members) > 1 else [up]
                arrays |= {f"{name}.up": part.astype(up_dtype) for name, part in zip(members, parts, strict=True)}
        if updated is not None:
            self._update(block, updated, arrays)
        return arrays

    def _update(self, block: range, updated: LayerPass, arrays: dict[str, np.ndarray]) -> None:
        """Fits second factors, given in float64, to the inputs that the layers before give as they are compressed."""
        for index in block:
            moments = updated.statistics(index, self._folder.get)
            for site in self._dense.sites(index):
                up = arrays.get(f"{site}.up")
                moment = moments[site].moment
                if up is None or moment is None:
                    continue
                factors = Factors(up, arrays[self._dense.down(site)])
                with _writer_tells():
                    arrays[f"{site}.up"] = refit_groups(self._dense.weight([site]), factors, moment).up.astype(
                        self._dtype
                    )
            self._advance(updated, range(index, index + 1), arrays)

    def _add(self, writer: FolderWriter, block: range, arrays: dict[str, np.ndarray]) -> None:
        """Writes the factors of a block of layers, and its weights that stay dense."""
        for name, array in arrays.items():
            writer.add(name, array)
        for site in (site for index in block for site in self._dense.sites(index)):
            if f"{site}.up" not in arrays:
                writer.add(f"{site}.weight", self._dense.weight([site]))

    def _advance(self, stream: LayerPass, block: range, arrays: dict[str, np.ndarray]) -> None:
        """Moves a stream on through layers with those factors in place of the weights they stand for; not beyond the last one."""

        def get(name: str) -> np.ndarray:
            site = name.removesuffix(".weight")
            if f"{site}.up" not in arrays:
                return self._folder.get(name)
            return multiplied(arrays[f"{site}.up"], arrays[self._dense.down(site)])

        for index in block:
            if index + 1 < self._config.num_layers:
                stream.advance(index, get)


def _writer_tells() -> np.errstate:
    """Overflow is no matter here: the writer says which arrays are not finite."""
    return np.errstate(over="ignore", invalid="ignore")
