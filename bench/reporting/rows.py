"""The rows of `decode.jsonl`, by what was measured and with what."""

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]

# In the order of columns and legends.
IMPLEMENTATIONS = {
    "flashsvd_jax": "flashsvd_jax",
    "flashsvd_jax-xla": "plain XLA",
    "torch-compile": "torch.compile",
    "torch-whole-graph": "PyTorch, one CUDA graph",
    "torch-layer-graph": "FlashSVD v1.5's path",
    "torch-eager": "PyTorch eager",
}
OURS = ("flashsvd_jax", "flashsvd_jax-xla")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What was measured. ``kept`` is the share of the layers' parameters to two digits, ``ranks`` dense, uniform or mixed."""

    suite: str
    model: str
    ranks: str
    batch: int
    context: int
    kept: float

    @property
    def place(self) -> tuple[Any, ...]:
        """To sort by: dense models first, then most kept to least."""
        order = ("dense", "uniform", "mixed").index(self.ranks)
        return self.suite, self.model, self.batch, self.context, order, -self.kept

    @property
    def kept_text(self) -> str:
        """As tables show it."""
        if self.ranks == "dense":
            return "all (dense)"
        return f"{self.kept:.2f}" + (", mixed" if self.ranks == "mixed" else "")


@dataclasses.dataclass(frozen=True)
class Results:
    """The newest row of every setting and implementation."""

    by_setting: dict[Setting, dict[str, Row]]

    def settings(self, suite: str = "decode", **fields: Any) -> list[Setting]:
        """Settings of a suite, in order, whose other fields have these values."""
        wanted = {"suite": suite, **fields}
        found = [s for s in self.by_setting if all(getattr(s, name) == value for name, value in wanted.items())]
        return sorted(found, key=lambda setting: setting.place)

    def row(self, setting: Setting, impl: str) -> Row | None:
        """The row, which may be a failure; None where nothing was measured."""
        return self.by_setting.get(setting, {}).get(impl)

    def value(self, setting: Setting, impl: str, key: str = "ms_per_token") -> float | None:
        """A number of the row; None where there is none."""
        return (self.row(setting, impl) or {}).get(key)

    def own(self, setting: Setting) -> Row | None:
        """The measured row of our own fastest way: with kernels, or plain XLA where that was not measured."""
        rows = (self.row(setting, impl) for impl in OURS)
        return next((row for row in rows if row is not None and "error" not in row), None)

    def implementations(self, settings: Iterable[Setting]) -> list[str]:
        """Those that have a row, be it a failure, of any of the settings."""
        found = {impl for setting in settings for impl in self.by_setting[setting]}
        return [impl for impl in IMPLEMENTATIONS if impl in found]


def results(file: Path, where: Callable[[Row], bool] = lambda row: True) -> Results:
    """Reads the rows of bfloat16 that satisfy ``where``; a failure counts only where nothing was measured."""
    found: dict[Setting, dict[str, Row]] = {}
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    for row in map(json.loads, lines):
        if row["dtype"] != "bfloat16" or not where(row):
            continue
        if row["impl"] in OURS and "kernels" not in row and "error" not in row:
            continue  # of a runtime that had one implementation of everything, neither of the two of now
        by_impl = found.setdefault(_setting(row), {})
        earlier = by_impl.get(row["impl"])
        if "error" not in row or earlier is None or "error" in earlier:
            by_impl[row["impl"]] = row
    return Results(found)


def _setting(row: Row) -> Setting:
    ranks = row.get("ranks") or ("dense" if row["ratio"] == 1 else "uniform")  # early rows have no mixed ranks
    return Setting(row["suite"], row["model"], ranks, row["batch"], row["context"], round(row["ratio"], 2))
