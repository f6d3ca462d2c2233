"""Writes the README's measured parts, the plots and the costs of decoding from what measurements left, nothing by hand.

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

import decode_costs
from reporting import compression, compression_large, plots, prompt_plots, prompts, tables
from reporting.rows import results

from converters import FAMILIES
from converters.families import WITHOUT_FORM
from flashsvd_jax.compress.decode_costs import COSTS_FILE

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
BUNDLED = ROOT / "flashsvd_jax" / "bundled"


DECODE = RESULTS / "nvidia_h200" / "decode.jsonl"
ENCODER = RESULTS / "nvidia_h200" / "encoder.jsonl"
PREFILL = RESULTS / "nvidia_h200" / "prefill.jsonl"
PLOTS = ROOT / "bench" / "plots"
PLOT_TEXTS = {
    "ratio": "Milliseconds a token against the parameters kept",
    "context": "Milliseconds a token against the context",
    "batch": "Milliseconds a token against the batch",
}
PROMPT_PLOT_TEXTS = {"prefill": "Operations a second of prompts against their tokens"}
ENCODER_PLOT_TEXTS = {
    "encoder_latency": "Milliseconds of an encoder's pass against the parameters kept",
    "encoder_memory": "Memory of an encoder's pass against the parameters kept",
}


def decode_table() -> str:
    """Decoding with every implementation."""
    return tables.decode(results(DECODE))


def start_table() -> str:
    """First tokens and first calls: rows of runs that compiled, and of runs that found it all compiled."""

    def found_compiled(row: dict[str, Any]) -> bool | None:
        """None of runs that shared the device, whose first call was not timed."""
        timed = "compiled" in row and row["cold_start_s"] is not None
        return row["cache_hits"] == row["compiled"] if timed else None

    own = [results(DECODE, lambda row, cached=cached: found_compiled(row) is cached) for cached in (False, True)]
    table = tables.start(*own)
    return table and f"The first call of a process compiles, unless an earlier process left its executables:\n\n{table}"


def dense_table() -> str:
    """Low rank against our own dense model."""
    return tables.low_rank_against_dense(results(DECODE))


def allocated_table() -> str:
    """Ranks by time against uniform ones; with its sentence, because there may be no rows."""
    table = tables.allocated_against_uniform(results(DECODE))
    said = (
        "Ranks as `compress --ms-per-token --alloc greedy` chooses them (for losses that fall as a power of the rank, drawn for"
        " each site), against uniform ranks with as many parameters, milliseconds a token:"
    )
    return table and f"{said}\n\n{table}"


def speedup_table() -> str:
    """Against plain XLA and PyTorch; with its sentence, because early rows give no such table."""
    table = tables.speedups(results(DECODE))
    return table and f"Milliseconds a token of each of the others, divided by those of flashsvd_jax:\n\n{table}"


def end_to_end_table() -> str:
    """Whole requests; with its sentence, likewise."""
    table = tables.end_to_end(results(DECODE))
    return table and f"Milliseconds from a call to its last token, prompt + new tokens:\n\n{table}"


def plot_links() -> str:
    """The plots there are rows for."""
    return _links(PLOT_TEXTS)


def prefill_plot_links() -> str:
    """Those of prompts."""
    return _links(PROMPT_PLOT_TEXTS)


def encoder_plot_links() -> str:
    """Those of encoders."""
    return _links(ENCODER_PLOT_TEXTS)


def _links(texts: dict[str, str]) -> str:
    drawn = all_plots()
    return "\n".join(f"![{text}](bench/plots/{name}.svg)" for name, text in texts.items() if name in drawn)


def all_plots() -> dict[str, plots.Data]:
    """Name -> data of the plots there are rows for."""
    return plots.plots(results(DECODE)) | prompt_plots.plots(ENCODER, PREFILL)


def encoder_table() -> str:
    """Encoders."""
    return prompts.encoder(ENCODER)


def encoder_factors() -> str:
    """What encoders of ours take in memory and time beside others; with its sentence, because early rows give no such table."""
    table = prompts.encoder_factors(ENCODER)
    return table and (
        "Memory of flashsvd_jax against that of plain JAX, and how many times as fast it is. Others are plain SVD at the same\n"
        f'ratio where nothing is said, else dense; "cuDNN" and "scores" are how they attend:\n\n{table}'
    )


def minilm_table() -> str:
    """A real encoder's vectors at several ratios."""
    return prompts.minilm(RESULTS / "cpu" / "minilm.jsonl")


def prefill_table() -> str:
    """Prompts of decoders."""
    return prompts.prefill(PREFILL)


def prefill_factors() -> str:
    """Prompts against others; with its sentence, because there may be no such rows."""
    table = prompts.prefill_factors(PREFILL)
    return (
        table
        and f"Those of flashsvd_jax as a share of that rate, and how many times as fast as others they are:\n\n{table}"
    )


def bundled_table() -> str:
    """Held-out perplexity of the bundled model."""
    measured = _measured()
    lines = ["| bundled model | parameters | held-out perplexity |", "|---|---|---|"]
    for name in ("dense", "compressed"):
        m = measured[name]
        lines.append(f"| {name} | {m['parameters']:,} | {m['perplexity']:.2f} ± {m['standard_error']:.2f} |")
    return "\n".join(lines)


def compression_table() -> str:
    """Held-out perplexity by method of compression."""
    return compression.compression(compression.read(RESULTS / "cpu" / "compression.jsonl"))


def compression_large_table() -> str:
    """What compressing models of a published size takes; with its sentence, because there may be no rows."""
    table = compression_large.table(compression_large.read(sorted(RESULTS.glob("*/compression_large.jsonl"))))
    return table and f"What it takes for random weights of published shapes (`bench/compress_large.py`):\n\n{table}"


def bundled_sample() -> str:
    """A completion by the compressed model."""
    measured = _measured()
    options = ", ".join(f"{name} {value}" for name, value in measured["options"].items())
    code = measured["prompt"] + measured["compressed"]["completion"].rstrip()
    return f"({options})\n\n```python\n{code}\n```"


def families() -> str:
    """The checkpoint families that are known, whether they are read, and methods that have no form of their own."""
    lines = ["| family | read | what |", "|---|---|---|"]
    for family in FAMILIES:
        lines.append(f"| `{family.name}` | {'no' if family.refusal else 'yes'} | {family.description} |")
    lines += ["", "Methods that publish no form of their own:", "", "| method | read as |", "|---|---|"]
    return "\n".join([*lines, *(f"| {method} | {how} |" for method, how in WITHOUT_FORM)])


def _measured() -> dict[str, Any]:
    return json.loads((BUNDLED / "measured.json").read_text(encoding="utf-8"))


PARTS: dict[str, Callable[[], str]] = {
    "allocated": allocated_table,
    "compression": compression_table,
    "compression_large": compression_large_table,
    "decode": decode_table,
    "dense": dense_table,
    "encoder": encoder_table,
    "encoder_factors": encoder_factors,
    "encoder_plots": encoder_plot_links,
    "end_to_end": end_to_end_table,
    "families": families,
    "minilm": minilm_table,
    "perplexity": bundled_table,
    "plots": plot_links,
    "prefill": prefill_table,
    "prefill_factors": prefill_factors,
    "prefill_plots": prefill_plot_links,
    "sample": bundled_sample,
    "speedups": speedup_table,
    "start": start_table,
}


def render(text: str) -> str:
    """The README with every measured part replaced by what the files say."""

    def part(match: re.Match[str]) -> str:
        return f"<!-- measured: {match[1]} -->\n{PARTS[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- measured: (\w+) -->\n.*?<!-- end -->", part, text, flags=re.DOTALL)


def main() -> int:
    """Updates README.md, the plots and the costs, or checks them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether all that is up to date")
    check = parser.parse_args().check
    readme = ROOT / "README.md"
    text, wanted = readme.read_text(encoding="utf-8"), all_plots()
    updated = render(text)
    if not check:
        readme.write_text(updated, encoding="utf-8")
        COSTS_FILE.write_text(decode_costs.render(), encoding="utf-8")
        plots.write(PLOTS, wanted)
        return 0
    wrong = [f"bench/plots/{name}.svg" for name in plots.stale(PLOTS, wanted)]
    if updated != text:
        wrong.insert(0, "README.md")
    if COSTS_FILE.read_text(encoding="utf-8") != decode_costs.render():
        wrong.append(COSTS_FILE.name)
    if wrong:
        print(f"not what was measured: {', '.join(wrong)}; run python bench/report.py", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
