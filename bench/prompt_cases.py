"""What the benchmarks of encoders and of prompts have in common: a case in a process of its own, and its row."""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from case_process import ScriptProcess, in_turn
from decode import environment
from jobs import HERE, append_row, results_folder

from flashsvd_jax.benchmark import provenance


@dataclasses.dataclass(frozen=True)
class PromptCase:
    """One measurement by one implementation; ``ratio`` 1 is the dense model."""

    impl: str
    model: str
    ratio: float
    batch: int
    length: int
    repeats: int = 20

    suite = "prompt"

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls(**json.loads(text))

    def described(self) -> dict[str, Any]:
        """The keys that say what a row is of."""
        return {"suite": self.suite, **{k: v for k, v in dataclasses.asdict(self).items() if k != "repeats"}}

    def flops(self) -> int:
        """Multiplications and additions of a pass."""
        raise NotImplementedError

    @property
    def script(self) -> str:
        """The file of this folder that measures it."""
        raise NotImplementedError


Size = tuple[str, float, int, int]
"""Model, share of parameters kept, batch, length."""

TINY: tuple[Size, ...] = (("tiny", 0.5, 2, 32), ("tiny", 1.0, 2, 32))


def arguments(
    description: str | None, impls: Sequence[str], models: Sequence[str], argv: Sequence[str] | None
) -> argparse.Namespace:
    """The parsed command line of a script that measures such cases."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--impls", default=",".join(impls), metavar="NAME,..", help=f"of: {', '.join(impls)}")
    parser.add_argument("--models", default=",".join(models), metavar="NAME,..", help="or tiny, for a CPU")
    parser.add_argument(
        "--ratios", metavar="R,..", help="of kept parameters, 1 is dense; those of all cases if not given"
    )
    parser.add_argument("--sizes", metavar="BxL,..", help="such as 8x512; those of all cases if not given")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="S", help="start no case after so long")
    parser.add_argument("--case-limit", type=float, default=120.0, metavar="S", help="a case that takes longer fails")
    parser.add_argument(
        "--ahead",
        type=int,
        default=0,
        metavar="N",
        help="start so many cases before their turn; they use the GPU one by one",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="bench/results/<device>/<suite>.jsonl if not given")
    return parser.parse_args(argv)


def chosen_sizes(parsed: argparse.Namespace, cases: Sequence[Size]) -> list[Size]:
    """Those that the command line asks for, the tiny model's among them."""
    models = parsed.models.split(",")
    ratios = None if parsed.ratios is None else [float(ratio) for ratio in parsed.ratios.split(",")]
    sizes = None if parsed.sizes is None else parsed.sizes.split(",")
    return [
        (model, ratio, batch, length)
        for model, ratio, batch, length in (*cases, *TINY)
        if model in models and (ratios is None or ratio in ratios) and (sizes is None or f"{batch}x{length}" in sizes)
    ]


def row_of(case: PromptCase, latency: float, attention: Sequence[str], **memory: int | None) -> dict[str, Any]:
    """A row's figures from the seconds of a pass; ``memory`` as rows name it."""
    return {
        **case.described(), "attention": list(attention), "latency_ms": round(1e3 * latency, 3),
        "tokens_per_s": round(case.batch * case.length / latency, 1), "temp_bytes": None, "peak_activation_bytes": None,
        **memory, "tflops": round(case.flops() / latency / 1e12, 2),
    }  # fmt: skip


WARM_S = 1.5


def warm_up(run: Callable[[], Any], on_gpu: bool) -> None:
    """Runs a pass that waits for its results once and, on a GPU, again and again, as long as its clock may take to settle.

    A dense prompt of 8 x 512 took plain JAX 74.5 ms in ten passes of a process of its own, and 82.0 among many in turn with others.
    """
    start = time.perf_counter()
    run()
    while on_gpu and time.perf_counter() - start < WARM_S:
        run()


def median_seconds(run: Callable[[], Any], repeats: int) -> float:
    """The median time of a call that waits for its results."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measured(cases: Sequence[PromptCase], limit: float, budget: float, ahead: int = 0) -> Iterator[dict[str, Any]]:
    """The rows of cases, each from a process of its own, of those that begin before the budget is spent.

    ``limit`` counts the seconds after the case before has ended; cases that were started ahead may have the GPU meanwhile.
    """
    begin = time.time()

    def start(number: int, case: PromptCase, turns: dict[str, str]) -> ScriptProcess | None:
        if time.time() - begin > budget:
            print(f"left out, {budget:.0f} s were spent: {case}")
            return None
        print(f"[{time.time() - begin:5.0f} s] {number}/{len(cases)} {case}", flush=True)
        env = environment("peers" if "torch" in case.impl else "ours.py") | turns
        return ScriptProcess(HERE / case.script, case.to_json(), env)

    for case, process in in_turn(cases, ahead, start):
        yield {**case.described(), **process.row(limit), **provenance()}


def measure_all(cases: Sequence[PromptCase], parsed: argparse.Namespace) -> None:
    """Measures cases, appends their rows, and prints them as a table."""
    rows = []
    for row in measured(cases, parsed.case_limit, parsed.budget, parsed.ahead):
        rows.append(row)
        append_row(parsed.out or results_folder(row.get("device", "failed")) / f"{row['suite']}.jsonl", row)
    print(*map(_line, rows), sep="\n")


def _line(row: dict[str, Any]) -> str:
    what = f"{row['model']:<14} {row['ratio']:.2f} {row['batch']:>3} x {row['length']:<5} {row['impl']:<22}"
    if "error" in row:
        return f"{what} {row['error'][:70]}"
    memory = row["temp_bytes"] if row["peak_activation_bytes"] is None else row["peak_activation_bytes"]
    told = "" if memory is None else f"{memory / 2**20:9.0f} MiB"
    return f"{what} {row['latency_ms']:9.2f} ms {row['tflops']:7.1f} TFLOP/s {told}"
