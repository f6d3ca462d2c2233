"""Takes a prompt's pass apart: what the host takes to send it, and every kernel of a layer, in order.

For each size: the time of a pass that is waited for, of one of several in a queue, of the call alone until the host has it back,
and of a program that is given the same arguments and does nothing. Then, from a profile with command buffers on, the kernels of a
layer, each with its own time and the time from its start to the next one's, and what all layers take of a pass. Nothing is kept.
"""

import argparse
import itertools
import os
import re
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from kernel_times import GRAPHS_IN_PROFILES, Event, layers, profiled
from prefill_cases import PrefillCase
from prefill_ours import lower_prompt
from prompt_cases import median_seconds
from prompt_timing import matrix_rate

from flashsvd_jax.compile_cache import enable_persistent_cache
from pallas_kernels import prefer, record
from pallas_kernels.registry import Record

ATTENTION = re.compile(r".*(flash|sdpa|fmha).*")
QUEUED, REPEATS, PROFILED, OUTSIDE = 10, 5, 3, 4


def host_times(compiled: Any, operands: tuple[Any, ...]) -> dict[str, float]:
    """Seconds by what they are of; see the module's text."""
    nothing = jax.jit(lambda *given: jnp.zeros(()), keep_unused=True).lower(*operands).compile()
    wait = jax.block_until_ready

    def until_sent() -> float:
        start = time.perf_counter()
        result = compiled(*operands)
        taken = time.perf_counter() - start
        wait(result)
        return taken

    def queue() -> None:
        for _ in range(QUEUED):
            result = compiled(*operands)
        wait(result)

    wait([compiled(*operands), nothing(*operands)])
    return {
        "waited for": median_seconds(lambda: wait(compiled(*operands)), 2 * REPEATS),
        "queued": median_seconds(queue, REPEATS) / QUEUED,
        "until sent": statistics.median(until_sent() for _ in range(2 * REPEATS)),
        "nothing, waited for": median_seconds(lambda: wait(nothing(*operands)), 2 * REPEATS),
    }


def layer_lines(events: Sequence[Event], count: int) -> list[str]:
    """Lines of text: the kernels of a layer, means over those found, and the sums of ``count`` layers."""
    found = layers(events, ATTENTION)
    if not found:
        return ["no layers in the profile; kernels: " + ", ".join(sorted({event["name"] for event in events}))]
    lines, own, until_next = [], 0.0, 0.0
    for place in range(len(found[0]) - 1):
        took = statistics.mean(kernels[place]["dur"] for kernels in found)
        step = statistics.mean(kernels[place + 1]["ts"] - kernels[place]["ts"] for kernels in found)
        lines.append(f"  {took:8.2f} {step:8.2f} us  {found[0][place]['name'][:100]}")
        own, until_next = own + took, until_next + step
    lines.append(
        f"  {own:8.2f} {until_next:8.2f} us  a layer, of {len(found)} found; its kernels, and from first to next"
    )
    return [*lines, f"  {own * count / 1e3:8.2f} {until_next * count / 1e3:8.2f} ms  {count} layers"]


def outside_lines(events: Sequence[Event]) -> list[str]:
    """Lines of text: the longest kernels that run once a pass, and the time from one pass to the next."""
    times: dict[str, list[float]] = {}
    for event in events:
        times.setdefault(event["name"], []).append(event["dur"])
    once = {name: statistics.mean(taken) for name, taken in times.items() if len(taken) == PROFILED}
    longest = sorted(once, key=lambda name: -once[name])[:OUTSIDE]
    lines = [f"  {once[name]:8.2f} us  {name[:100]}, once a pass" for name in longest]
    if once:
        starts = [event["ts"] for event in events if event["name"] == longest[0]]
        apart = statistics.mean(b - a for a, b in itertools.pairwise(starts))
        lines.append(f"  {apart / 1e3:8.2f} ms  from the first of these in one pass to that in the next")
    return lines


def dissect(case: PrefillCase, implementation: str | None) -> list[str]:
    """Lines of text on one size."""
    used = Record()
    with record(used), prefer(implementation):
        lowered, draw = lower_prompt(case.config, case.batch, case.length)
        operands, compiled = draw(), lowered.compile()
    times = host_times(compiled, operands)
    chosen = ", ".join(f"{op}: {'/'.join(sorted(names))}" for op, names in used.items())
    lines = [f"{case.batch} x {case.length}, {chosen}"]
    lines += [f"  {1e3 * seconds:8.3f} ms  {name}" for name, seconds in times.items()]
    rates = (case.flops() / times[name] / 1e12 for name in ("waited for", "queued"))
    lines.append("  {:8.1f} TFLOP/s waited for, {:.1f} queued".format(*rates))
    events = profiled(lambda: jax.block_until_ready([compiled(*operands) for _ in range(PROFILED)]))
    return lines + layer_lines(events, case.config.num_layers) + outside_lines(events)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llama-2-7b")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--sizes", default="1x512,8x512", metavar="BxL,..")
    parser.add_argument("--prefer", metavar="NAME", help="implementation that is tried first")
    parsed = parser.parse_args(argv)
    # Read when XLA starts: a profile would otherwise be of kernels that are sent one by one.
    os.environ["XLA_FLAGS"] = f"{GRAPHS_IN_PROFILES} {os.environ.get('XLA_FLAGS', '')}"
    if jax.default_backend() != "gpu":
        print("error: kernels are timed on a GPU", file=sys.stderr)
        return 1
    enable_persistent_cache()
    lines = []
    for size in parsed.sizes.split(","):
        batch, length = map(int, size.split("x"))
        lines += dissect(PrefillCase("flashsvd_jax", parsed.model, parsed.ratio, batch, length), parsed.prefer)
    print(*lines, f"matrix rate {matrix_rate() / 1e12:.0f} TFLOP/s", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
