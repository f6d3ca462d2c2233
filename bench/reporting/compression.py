"""Tables of `compression.jsonl`: held-out perplexity by method, ratio and choice of ranks, and what in it is beyond chance."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flashsvd_jax.compress import METHODS
from flashsvd_jax.scoring import Perplexity
from reporting.tables import markdown

Row = dict[str, Any]
ALLOCATIONS = ("uniform", "greedy", "greedy alike", "v2", "fisher")
BEYOND_CHANCE = 2.0
"""Standard errors that a ratio of perplexities must differ from 1 by."""


class Rows:
    """The newest row of every method, ratio and choice of ranks, all of one set of calibration windows: that of the last row."""

    def __init__(self, rows: Iterable[Row]):
        rows = list(rows)
        self.calibration = {key: rows[-1][key] for key in ("samples", "length", "seed")} if rows else {}
        chosen = (row for row in rows if all(row[key] == value for key, value in self.calibration.items()))
        self._by_setting = {_setting(row): row for row in chosen}

    def get(self, method: str, ratio: float, alloc: str = "uniform", kind: str = "") -> Row | None:
        """``kind`` is "", "updated" or "tuned"."""
        return self._by_setting.get((method, ratio, alloc, kind))

    @property
    def ratios(self) -> list[float]:
        """Most kept first, the dense model's left out."""
        return sorted({ratio for method, ratio, *_ in self._by_setting if method != "dense"}, reverse=True)


def read(file: Path) -> Rows:
    """The rows of a file, which need not exist."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return Rows(map(json.loads, lines))


def compression(rows: Rows) -> str:
    """The table, and sentences that say what it shows; "" where there is no row."""
    dense = rows.get("dense", 1.0)
    if dense is None or not rows.ratios:
        return ""
    lines = [
        [f"{ratio:g}", f"`{method}`", *(_cell(rows, method, ratio, alloc) for alloc in ALLOCATIONS)]
        for ratio in rows.ratios
        for method in METHODS
        if rows.get(method, ratio)
    ]
    c = rows.calibration
    head = (
        f"Held-out perplexity of the bundled model, {dense['perplexity']:.2f} ± {dense['standard_error']:.2f} dense, statistics of"
        f" {c['samples']} windows of {c['length']} tokens. In parentheses, uniform ranks as a multiple of plain SVD's, others of"
        " the same method's uniform ones, with the standard error of that over windows:"
    )
    table = markdown(["kept", "method", *ALLOCATIONS], lines)
    return "\n\n".join(part for part in (head, table, _findings(rows), _further(rows)) if part)


def _cell(rows: Rows, method: str, ratio: float, alloc: str) -> str:
    row, reference = rows.get(method, ratio, alloc), rows.get(method if alloc != "uniform" else "svd", ratio)
    return _beside(row, reference)


def _beside(row: Row | None, reference: Row | None) -> str:
    """A perplexity, and as a multiple of another."""
    if row is None:
        return "-"
    text = f"{row['perplexity']:.2f}"
    if reference is None or reference is row:
        return text
    value, error = _over(row, reference)
    return f"{text} ({value:.3f} ± {error:.3f})"


def _findings(rows: Rows) -> str:
    """Who beats whom, counted over the ratios."""
    others = [method for method in METHODS if method != "svd"]
    found = [_counted([(rows.get(m, ratio), rows.get("svd", ratio)) for ratio in rows.ratios]) for m in others]
    said = [f"`{method}` {count}" for method, count in zip(others, found, strict=True) if count]
    sentences = (
        [f"Better than plain SVD by more than {BEYOND_CHANCE:g} standard errors, uniform ranks: {', '.join(said)}."]
        if said
        else []
    )
    for alloc in (*ALLOCATIONS[1:], "effective", "importance", "sensitivity", "learned"):
        pairs = [(rows.get(m, ratio, alloc), rows.get(m, ratio)) for ratio in rows.ratios for m in METHODS]
        better, worse = _counted(pairs), _counted([(b, a) for a, b in pairs])
        if better:
            sentences.append(f"Than uniform ranks, `{alloc}` is better in {better} and worse in {worse}.")
    return " ".join(sentences)


def _counted(pairs: Sequence[tuple[Row | None, Row | None]]) -> str:
    """How many first ones are below their second one, beyond chance."""
    values = [_over(row, other) for row, other in pairs if row is not None and other is not None]
    return f"{sum(value < 1 - BEYOND_CHANCE * error for value, error in values)} of {len(values)}" if values else ""


def _further(rows: Rows) -> str:
    """What is measured with uniform ranks beside its own plain form."""
    kinds = (
        ("`drone` with `--update`", "drone", "uniform", "updated"),
        ("`svdllm`, fine-tuned", "svdllm", "uniform", "tuned"),
        ("`asvd`, ranks by sensitivity", "asvd", "sensitivity", ""),
        ("`drone`, ranks by sensitivity", "drone", "sensitivity", ""),
        ("`drone`, `fisher` ranks, `--alike`", "drone", "fisher alike", ""),
        ("`basis_sharing`, `effective` ranks (D-Rank)", "basis_sharing", "effective", ""),
        ("`drone`, `effective` ranks", "drone", "effective", ""),
        ("`svdllm`, `importance` ranks (AdaSVD)", "svdllm", "importance", ""),
        ("`drone`, `importance` ranks", "drone", "importance", ""),
        ("`drone`, `learned` ranks", "drone", "learned", ""),
        ("`saes`, `learned` ranks", "saes", "learned", ""),
    )
    lines = []
    for text, method, alloc, kind in kinds:
        cells = [_beside(rows.get(method, r, alloc, kind), rows.get(method, r)) for r in rows.ratios]
        if any(cell != "-" for cell in cells):
            lines.append([text, *cells])
    if not lines:
        return ""
    table = markdown(["kept", *(f"{ratio:g}" for ratio in rows.ratios)], lines)
    tuned = next((r for ratio in rows.ratios if (r := rows.get("svdllm", ratio, "uniform", "tuned"))), None)
    how = ""
    if tuned is not None:
        f = tuned["finetune"]
        how = f"; fine-tuning is {f['steps']} steps of {f['batch']} windows of {f['length']} tokens of the calibration text"
    return f"The same with more done, as a multiple of the same method's uniform ranks without{how}:\n\n{table}"


def _over(row: Row, other: Row) -> tuple[float, float]:
    return _perplexity(row).over(_perplexity(other))


def _perplexity(row: Row) -> Perplexity:
    losses = tuple(np.full(count, mean) for mean, count in row["window_losses"])
    return Perplexity(row["perplexity"], math.nan, row["tokens"], row["windows"], row["window"], losses)


def _setting(row: Row) -> tuple[str, float, str, str]:
    kind = "updated" if row["update"] else "tuned" if row.get("finetune") else ""
    return row["method"], row["ratio"], row["alloc"], kind
