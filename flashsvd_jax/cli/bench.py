"""Measure prompt processing (pp) and decoding (tg) of a model, or of a published shape with random weights."""

import argparse
import csv
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, TextIO

from flashsvd_jax.cli.options import add_materialize, check_folder_of, numbers
from flashsvd_jax.errors import RequestError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("model", nargs="?", help="a converted model; or give --shape")
    parser.add_argument(
        "--shape",
        help="a published shape with random weights: llama-2-7b, llama-3.1-8b, qwen3-8b, phi-4, gemma-2-9b, gemma-3-12b,"
        " opt-6.7b, gpt2-xl, tiny",
    )
    parser.add_argument("--ratio", default="0.5", metavar="R,..", help="with --shape: kept parameters; 1 is dense")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="as stored, or bfloat16, if not given"
    )
    add_materialize(parser)
    parser.add_argument("-b", "--batch", type=numbers, default=[1], metavar="N,..", help="sequences at once")
    parser.add_argument("-p", "--prompt", type=numbers, default=[512], metavar="N,..", help="prompt tokens")
    parser.add_argument("-n", "--new", type=int, default=64, metavar="N", help="generated tokens")
    parser.add_argument("-r", "--repeats", type=int, default=5, metavar="N", help="timed runs after one that compiles")
    parser.add_argument(
        "--kernels", default="auto", metavar="NAME", help="auto, or an implementation to try first, such as xla"
    )
    parser.add_argument("-o", "--output", choices=("md", "csv", "jsonl"), default="md", help="form of the rows")
    parser.add_argument("--append", type=Path, metavar="FILE", help="also append the rows to this file, as JSON lines")


def run(parsed: argparse.Namespace) -> None:
    """Runs the command."""
    from flashsvd_jax.benchmark import measure, read_bandwidth

    if (parsed.model is None) == (parsed.shape is None):
        raise RequestError("give either a model or --shape")
    if parsed.new < 1 or parsed.repeats < 1:
        raise RequestError("--new and --repeats must be at least 1")
    check_folder_of(parsed.append)
    bandwidth = read_bandwidth()
    writer = _Writer(parsed.output, sys.stdout)
    for name, config, weights in _models(parsed):
        for batch in parsed.batch:
            for context in parsed.prompt:
                rows = measure(
                    config, weights, name=name, batch=batch, context=context, new_tokens=parsed.new,
                    repeats=parsed.repeats, bandwidth=bandwidth, kernels=parsed.kernels,
                )  # fmt: skip
                for row in rows:
                    writer.write(dataclasses.asdict(row))
                    if parsed.append:
                        with parsed.append.open("a") as file:
                            print(json.dumps(dataclasses.asdict(row)), file=file)


def _models(parsed: argparse.Namespace) -> Any:
    """Yields (name, configuration, weights), one model in memory at a time."""
    if parsed.model is not None:
        from flashsvd_jax.model import load

        model = load(parsed.model, dtype=parsed.dtype, materialize=parsed.materialize)
        yield Path(parsed.model).name, model.config, model.weights
        return
    from flashsvd_jax.compile_cache import enable_persistent_cache
    from flashsvd_jax.models.expansion import as_loaded
    from flashsvd_jax.random_weights import random_weights
    from flashsvd_jax.shapes import shape_config
    from pallas_kernels import hardware_rank

    enable_persistent_cache()
    try:
        ratios = [float(r) for r in parsed.ratio.split(",")]
    except ValueError as error:
        raise RequestError(f"--ratio {parsed.ratio!r} is not a list of numbers such as 1,0.5") from error
    for ratio in ratios:
        config = shape_config(parsed.shape, ratio)
        loaded = as_loaded(config, parsed.materialize, hardware_rank)
        yield parsed.shape, config, random_weights(loaded, parsed.dtype or "bfloat16")


class _Writer:
    """Prints rows as they are measured."""

    def __init__(self, form: str, out: TextIO):
        self._form, self._out, self._first = form, out, True

    def write(self, row: dict[str, Any]) -> None:
        if self._form == "jsonl":
            print(json.dumps(row), file=self._out, flush=True)
        elif self._form == "csv":
            table = csv.DictWriter(self._out, row.keys())
            if self._first:
                table.writeheader()
            table.writerow(row)
        else:
            self._markdown(row)
        self._first = False

    def _markdown(self, row: dict[str, Any]) -> None:
        """llama-bench's columns, with the share of the bandwidth beside the speed."""
        share = row["fraction_of_bandwidth"]
        rate = row["bytes_per_token"] / row["ms_per_token"] / 1e6
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
        cells = {
            "model": row["model"],
            "ratio": f"{row['ratio']:.2f}",
            "dtype": row["dtype"],
            "batch": row["batch"],
            "test": row["test"],
            "t/s": f"{row['tokens_per_s']:.1f} ± {row['tokens_per_s_deviation']:.1f}",
            "ms/step" if share is not None else "ms": (
                f"{row['ms_per_token']:.3f}" if share is not None else f"{row['prefill_ms']:.2f}"
            ),
            "GB/s (of peak)": "-" if share is None else f"{rate:.0f} ({share:.0%})",
            "peak MiB": peak,
            "cold s": row["cold_start_s"],
        }
        if self._first:
            names = ["ms" if name == "ms/step" else name for name in cells]
            print("| " + " | ".join(names) + " |\n|" + "---|" * len(cells), file=self._out)
        print("| " + " | ".join(map(str, cells.values())) + " |", file=self._out, flush=True)
