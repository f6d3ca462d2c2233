"""Pictures of a model; needs matplotlib."""

from pathlib import Path

import numpy as np

from flashsvd_jax.errors import MissingExtraError, RequestError
from flashsvd_jax.inspection_result import Inspection


def plot_ranks(found: Inspection, file: str | Path) -> None:
    """Saves a heat map of the share of numbers kept by layer and projection, dense sites in grey.

    Args:
      found: from `inspect`.
      file: where to; its suffix gives the format.

    Raises:
      MissingExtraError: matplotlib is not installed.
      RequestError: the file cannot be written, or its suffix names no format.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise MissingExtraError("plotting", "matplotlib", "plot") from error
    figure = Figure(figsize=(3 + 0.3 * found.num_layers, 4), layout="constrained")
    axes = figure.add_subplot()
    colors = colormaps["viridis"].with_extremes(bad="lightgrey")
    kept = _kept(found)
    image = axes.imshow(kept, aspect="auto", vmin=0, vmax=np.nanmax([*kept.flat, 1.0]), cmap=colors)
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_yticks(range(len(found.projections)), list(found.projections))
    axes.set_title(f"{Path(found.path).name}: {found.params / found.params_dense:.1%} of the dense parameters")
    figure.colorbar(image, label="share of numbers kept (grey: dense)")
    try:
        figure.savefig(file, dpi=150)
    except (OSError, ValueError) as error:  # ValueError: no such format
        raise RequestError(f"{file} cannot be written: {error}") from error


def _kept(found: Inspection) -> np.ndarray:
    """[projections, layers], NaN where a site is dense."""
    low_rank = {site.name: site.kept for site in found.sites if site.rank is not None}
    layers = range(found.num_layers)
    return np.array(
        [[low_rank.get(f"layers_{i}.{path}", np.nan) for i in layers] for path in found.projections.values()]
    )
