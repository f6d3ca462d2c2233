"""Plots of the rows: first as plain data, then as SVG files that carry the data they were drawn from.

A file is up to date if that data is what the rows give; where the same version of matplotlib is at hand, also byte for byte.
"""

import html
import io
import json
import re
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from reporting.prompts import IMPLEMENTATIONS as PROMPTS
from reporting.rows import IMPLEMENTATIONS, Results, Setting

FLOOR = "floor: bytes over bandwidth"
MATRIX_RATE = "large matrix products"
DENSE = "dense, fastest of ours"
KEPT = "parameters kept in the layers"
Data = dict[str, Any]
"""{"x", "y", "panels": [{"title", "series": [{"label", "x", "y"}]}]}, "yscale" where it is not "log"; names and numbers only."""
_CREATOR = re.compile(r"<dc:creator>.*?<dc:title>(.*?)</dc:title>", re.DOTALL)
_DESCRIPTION = re.compile(r"<dc:description>(.*?)</dc:description>", re.DOTALL)


def plots(results: Results) -> dict[str, Data]:
    """Name -> data of every plot that has at least two points to join."""
    llama = {"model": "llama-2-7b"}
    half = [s for s in results.settings(**llama, ranks="uniform") if s.kept == 0.5]
    at_512 = [s for s in results.settings(**llama, batch=1, context=512) if s.ranks in ("dense", "uniform")]
    by_ratio = _panel(results, "batch 1, context 512", at_512, lambda s: s.kept)
    _add_dense_level(results, at_512, by_ratio)
    found = {
        "ratio": (KEPT, [by_ratio]),
        "context": (
            "context, tokens",
            [
                _panel(results, f"half the parameters, batch {b}", [s for s in half if s.batch == b], lambda s: s.context)
                for b in (1, 8)
            ],
        ),
        "batch": (
            "batch, sequences",
            [
                _panel(
                    results, "half the parameters, context 512", [s for s in half if s.context == 512], lambda s: s.batch
                )
            ],
        ),
    }  # fmt: skip
    return {name: data for name, (x, panels) in found.items() if (data := data_of(x, "ms a token", panels))}


def draw(name: str, data: Data) -> bytes:
    """The SVG: the same bytes for the same data and version of matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(2.2 + 4 * len(data["panels"]), 3.8), layout="constrained")
        for panel, axes in zip(data["panels"], figure.subplots(1, len(data["panels"]), squeeze=False)[0], strict=True):
            for line in panel["series"]:
                axes.plot(line["x"], line["y"], label=line["label"], **_style(line["label"]))
            axes.set(title=panel["title"], xlabel=data["x"], ylabel=data["y"], yscale=data.get("yscale", "log"))
            if data["x"] != KEPT:
                axes.set_xscale("log", base=2)
            ticks = sorted({x for line in panel["series"] for x in line["x"]})
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.yaxis.set_major_formatter("{x:g}")
            if axes.get_yscale() == "log":
                axes.yaxis.set_minor_formatter("{x:g}")
            else:
                axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
        lines = {str(line.get_label()): line for axes in figure.axes for line in axes.get_lines()}
        figure.legend(list(lines.values()), list(lines), loc="outside right center")
        file = io.BytesIO()
        about = {"Date": None, "Creator": f"matplotlib {matplotlib.__version__}", "Description": json.dumps(data)}
        figure.savefig(file, format="svg", metadata=about)
    return file.getvalue()


def write(folder: Path, wanted: dict[str, Data]) -> None:
    """Draws the plots that are not up to date and removes those that have no data any more."""
    folder.mkdir(exist_ok=True)
    for name in stale(folder, wanted):
        file = folder / f"{name}.svg"
        if name in wanted:
            file.write_bytes(draw(name, wanted[name]))
        else:
            file.unlink()


def stale(folder: Path, wanted: dict[str, Data]) -> list[str]:
    """Names of plots that are missing, superfluous, or not drawn from this data."""
    present = {file.stem: file for file in sorted(folder.glob("*.svg"))}
    differ = [name for name, data in wanted.items() if name in present and not _is_drawing_of(present[name], data)]
    return sorted({*differ, *(wanted.keys() ^ present.keys())})


def _is_drawing_of(file: Path, data: Data) -> bool:
    text = file.read_text(encoding="utf-8")
    said, creator = _DESCRIPTION.search(text), _CREATOR.search(text)
    if said is None or html.unescape(said[1]) != json.dumps(data):
        return False
    try:
        comparable = creator is not None and creator[1] == f"matplotlib {metadata.version('matplotlib')}"
    except metadata.PackageNotFoundError:
        return True
    return not comparable or text.encode() == draw(file.stem, data)


def _panel(results: Results, title: str, settings: list[Setting], x_of: Callable[[Setting], float]) -> Data:
    """One series an implementation that has points, and the floor of our own rows below them."""
    settings = sorted(settings, key=x_of)
    lines = []
    for impl in results.implementations(settings):
        points = [(x_of(s), y) for s in settings if (y := results.value(s, impl)) is not None]
        lines.append(series(IMPLEMENTATIONS[impl], points))
    lines.append(series(FLOOR, [(x_of(s), own["floor_ms"]) for s in settings if (own := results.own(s))]))
    return {"title": title, "series": [line for line in lines if line["x"]]}


def _add_dense_level(results: Results, settings: list[Setting], panel: Data) -> None:
    """A level line at the time of our own dense model, which low rank is to beat."""
    own = next((row for s in settings if s.ranks == "dense" and (row := results.own(s))), None)
    if own is not None:
        kept = [s.kept for s in settings]
        panel["series"].append(series(DENSE, [(min(kept), own["ms_per_token"]), (max(kept), own["ms_per_token"])]))


def series(label: str, points: list[tuple[float, float]]) -> Data:
    """One line of a panel."""
    return {"label": label, "x": [x for x, _ in points], "y": [y for _, y in points]}


def data_of(x: str, y: str, panels: list[Data]) -> Data | None:
    """A plot of the panels that have something to join, None if there are none."""
    drawn = [panel for panel in panels if any(len(set(line["x"])) > 1 for line in panel["series"])]
    return {"x": x, "y": y, "panels": drawn} if drawn else None


def _style(label: str) -> dict[str, Any]:
    """One colour an implementation in every plot of a kind; lines that are no measurement of one have no markers."""
    if label in (FLOOR, MATRIX_RATE):
        return {"color": "black", "linestyle": "--"}
    if label == DENSE:
        return {"color": "grey", "linestyle": ":"}
    number = next(n for names in (IMPLEMENTATIONS, PROMPTS) for n, name in enumerate(names.values()) if name == label)
    return {"color": f"C{number}", "marker": "o", "linewidth": 2.0 if number < 2 else 1.2}
