"""The rows of `decode.jsonl`, by what was measured and with what."""

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]

# In the order of columns and legends.
IMPLEMENTATIONS = {
    "flashsvd_jax-persistent": "one launch",
    "flashsvd_jax-products": "separate kernels",
    "flashsvd_jax-xla": "plain XLA",
    "torch-compile": "torch.compile",
    "torch-whole-graph": "PyTorch, one CUDA graph",
    "torch-layer-graph": "FlashSVD v1.5's path",
    "torch-eager": "PyTorch eager",
}
OURS = ("flashsvd_jax-persistent", "flashsvd_jax-products", "flashsvd_jax-xla")
"""Our own, fastest first, named by what ran: what is chosen by itself depends on the call, and on the version."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What was measured. ``kept`` is the share of the layers' parameters to two digits, ``ranks`` as rows tell them.

    Of allocated ranks it is what they were chosen for, to one digit: they keep up to a percent less, another share with each table
    of costs.
    """

    suite: str
    model: str
    ranks: str
    batch: int
    context: int
    kept: float

    @property
    def place(self) -> tuple[Any, ...]:
        """To sort by: dense models first, then most kept to least."""
        order = ("dense", "uniform", "mixed", "partly dense", "allocated", "allocated alike").index(self.ranks)
        return self.suite, self.model, self.batch, self.context, order, -self.kept

    @property
    def kept_text(self) -> str:
        """As tables show it."""
        if self.ranks == "dense":
            return "all (dense)"
        return f"{self.kept:.2f}" + ("" if self.ranks == "uniform" else f", {self.ranks}")


@dataclasses.dataclass(frozen=True)
class Results:
    """The newest row of every setting and implementation, of others than ours the fastest."""

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
        """The measured row of our own fastest way."""
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
        impl = _what_ran(row)
        if impl is None:
            continue
        by_impl = found.setdefault(_setting(row), {})
        if counts_in_place_of(by_impl.get(impl), row, "total_ms" if row["suite"] == "end-to-end" else "ms_per_token"):
            by_impl[impl] = row
    return Results(found)


def counts_in_place_of(earlier: Row | None, row: Row, time: str) -> bool:
    """Whether a row takes an earlier one's place: ours as it is newer, another's if it is faster, as a slow host would flatter us.

    A failure counts only where nothing was measured. ``time`` is the key of what is compared.
    """
    if earlier is None or "error" in earlier:
        return True
    return "error" not in row and (row["impl"].startswith("flashsvd_jax") or row[time] <= earlier[time])


def _what_ran(row: Row) -> str | None:
    """Which of `IMPLEMENTATIONS` a row is of; None for those of a runtime that had one implementation of everything."""
    if not row["impl"].startswith("flashsvd_jax"):
        return row["impl"]
    kernels = row.get("kernels", "")
    if "decode_layers=persistent" in kernels:
        return "flashsvd_jax-persistent"
    if "attend_cached=triton" in kernels:
        return "flashsvd_jax-products"
    if kernels:
        return "flashsvd_jax-xla"
    # A failure does not say what ran.
    return row["impl"] if "error" in row and row["impl"] in OURS else None


def _setting(row: Row) -> Setting:
    ranks = row.get("ranks") or ("dense" if row["ratio"] == 1 else "uniform")  # early rows have no mixed ranks
    kept = round(row["ratio"], 1 if ranks.startswith("allocated") else 2)
    return Setting(row["suite"], row["model"], ranks, row["batch"], row["context"], kept)
