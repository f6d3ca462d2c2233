"""Writes the README's measured parts from the rows and files that measurements left; nothing there is typed by hand.

Each part stands between `<!-- measured: NAME -->` and `<!-- end -->`. With --check nothing is written, and a README that does
not say what was measured is an error.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from converters import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
BUNDLED = ROOT / "flashsvd_jax" / "bundled"


CASE = ("impl", "model", "ratio", "dtype", "batch", "context")


def newest(device: str, suite: str, from_cache: bool) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The newest row of every case, in the order of first measurement: of runs that compiled, or that found it all compiled."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in (RESULTS / device / f"{suite}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["suite"] == suite and (row["cache_hits"] == row["compiled"]) == from_cache:
            found[tuple(row[key] for key in CASE)] = row
    return found


def decode_table() -> str:
    """Decoding on the H200, with the floor that the bytes read set."""
    head = "| model | kept | batch | context | ms/token | floor | of bandwidth | tokens/s | prompt ms | start, cached |"
    lines = [head, "|" + "---|" * (head.count("|") - 1)]
    cached = newest("nvidia_h200", "decode", from_cache=True)
    for case, row in newest("nvidia_h200", "decode", from_cache=False).items():
        kept = "all (dense)" if row["ratio"] == 1 else f"{row['ratio']:.2f}"
        again = f"{cached[case]['cold_start_s']:.1f}" if case in cached else "-"
        lines.append(
            f"| {row['model']} | {kept} | {row['batch']} | {row['context']} | {row['ms_per_token']:.2f} | {row['floor_ms']:.2f}"
            f" | {row['fraction_of_bandwidth']:.0%} | {row['tokens_per_s']:.0f} | {row['prefill_ms']:.1f}"
            f" | {row['cold_start_s']:.1f} s, {again} s |"
        )
    return "\n".join(lines)


def bundled_table() -> str:
    """Held-out perplexity of the bundled model."""
    measured = _measured()
    lines = ["| bundled model | parameters | held-out perplexity |", "|---|---|---|"]
    for name in ("dense", "compressed"):
        m = measured[name]
        lines.append(f"| {name} | {m['parameters']:,} | {m['perplexity']:.2f} ± {m['standard_error']:.2f} |")
    return "\n".join(lines)


def bundled_sample() -> str:
    """A completion by the compressed model."""
    measured = _measured()
    options = ", ".join(f"{name} {value}" for name, value in measured["options"].items())
    code = measured["prompt"] + measured["compressed"]["completion"].rstrip()
    return f"({options})\n\n```python\n{code}\n```"


def families() -> str:
    """The checkpoint families that are known, and whether they are read."""
    lines = ["| family | read | what |", "|---|---|---|"]
    for family in FAMILIES:
        lines.append(f"| `{family.name}` | {'no' if family.refusal else 'yes'} | {family.description} |")
    return "\n".join(lines)


def _measured() -> dict[str, Any]:
    return json.loads((BUNDLED / "measured.json").read_text(encoding="utf-8"))


PARTS: dict[str, Callable[[], str]] = {
    "decode": decode_table,
    "families": families,
    "perplexity": bundled_table,
    "sample": bundled_sample,
}


def render(text: str) -> str:
    """The README with every measured part replaced by what the files say."""

    def part(match: re.Match[str]) -> str:
        return f"<!-- measured: {match[1]} -->\n{PARTS[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- measured: (\w+) -->\n.*?<!-- end -->", part, text, flags=re.DOTALL)


def main() -> int:
    """Updates README.md, or checks it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the README is up to date")
    check = parser.parse_args().check
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    updated = render(text)
    if check:
        if updated != text:
            print("README.md does not say what was measured: run python bench/report.py", file=sys.stderr)
        return int(updated != text)
    readme.write_text(updated, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
