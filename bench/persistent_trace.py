"""Shows when the programs of the persistent decode kernel do what: a clock is read around every wait and every product.

Prints for every step of a layer, means over layers in microseconds: when its first and its last program begin waiting for the
input, and end; how long a program waits and how long it multiplies; when the last program is done; how long the loading of its
tiles ran ahead. The marks cost a few percent. Nothing is kept; the raw clocks go to ``--raw`` as an .npz.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from one_shape import RANKS, options, shape_of
from persistent_times import lower_steps

from flashsvd_jax.kv_cache import CACHE_UNIT, empty_cache
from flashsvd_jax.models.absorption import weights_for_decoding
from flashsvd_jax.random_weights import random_weights
from pallas_kernels import decode, stall_reason
from pallas_kernels.persistent import building, code, kernel, multiplying
from pallas_kernels.persistent.plan import Plan

MARKS = ("multiplies", "filled", "done", "loads", "loaded")
HEADER = 16  # integers before the marks, the first of which is the stall
CALLS = 4


def _mark(place: Any, which: str) -> None:
    """Writes the clock where this program's mark of this step and layer belongs."""
    plan = place.launch.plan

    def body(e: Any, scalars: Any, refs: Any, arrays: Any) -> None:
        row = code.add(code.mul(e.layer, code.integer(len(plan.steps))), code.integer(place.step))
        row = code.add(code.mul(row, code.integer(len(MARKS))), code.integer(MARKS.index(which)))
        at = code.add(code.mul(row, code.integer(plan.programs)), code.add(code.program(), code.integer(HEADER)))
        at = code.mul(at, code.integer(4))
        alone = code.flag(code.equal(code.reader(), code.integer(0)))
        clock = "{ .reg .u32 t; .reg .pred q; .reg .u64 a; setp.ne.u32 q, $2, 0; mov.u32 t, %globaltimer_lo; "
        code.ptx(clock + "cvt.u64.u32 a, $1; add.u64 a, a, $0; @q st.global.u32 [a], t; }", refs[0], at, alone)

    place.emit(body, refs=[place.launch.stall])


def _marked(function: Callable[..., Any], before: str | None, after: str) -> Callable[..., Any]:
    def run(place: Any, *rest: Any) -> Any:
        if before:
            _mark(place, before)
        found = function(place, *rest)
        _mark(place, after)
        return found

    return run


@contextlib.contextmanager
def marking(size: int) -> Iterator[None]:
    """Kernels traced meanwhile write clocks behind their stall."""
    with contextlib.ExitStack() as stack:
        for owner, name, before, after in (
            (kernel, "multiply_step", "multiplies", "done"),
            (kernel, "attend_step", "multiplies", "done"),
            (kernel, "keep_stream", "filled", "done"),
            (kernel, "load_step", "loads", "loaded"),
            (multiplying, "fill", None, "filled"),
            (multiplying, "prepare", None, "filled"),
        ):
            stack.enter_context(mock.patch.object(owner, name, _marked(getattr(owner, name), before, after)))
        stack.enter_context(mock.patch.object(decode, "STALL_INTEGERS", size))
        yield


@contextlib.contextmanager
def _seen_plans(found: list[Plan]) -> Iterator[None]:
    original = building.Plan

    def build(*args: Any, **kwargs: Any) -> Plan:
        found.append(original(*args, **kwargs))
        return found[-1]

    with mock.patch.object(building, "Plan", build):
        yield


def table(plan: Plan, clocks: np.ndarray) -> list[str]:
    """Lines of text from clocks in ns, [layers + 1, steps, marks, programs], 0 where a program had nothing to do."""
    lines = [
        f"{'step':<14}{'begin':>8}{'begin<':>8}{'filled':>8}{'filled<':>8}{'done':>8}{'done<':>8}{'wait':>8}{'multiply':>9}{'lead':>8}"
    ]
    inner = clocks[2 : plan.layers].astype(np.float64)
    inner[inner == 0] = np.nan
    origin = np.nanmin(inner[:, 0, 0], axis=-1)[:, None]
    for step in range(plan.in_layer):
        begin, filled, done, loads, _ = (inner[:, step, m] - origin for m in range(len(MARKS)))
        busy = ~np.isnan(filled)
        ends = [f(a, axis=-1).mean() for a in (begin, filled, done) for f in (np.nanmin, np.nanmax)]
        wait, multiply = np.nanmean((filled - begin)[busy]), np.nanmean((done - filled)[busy])
        values = [*ends, wait, multiply, np.nanmean((begin - loads)[busy])]
        lines.append(f"{plan.steps[step].name:<14}" + "".join(f"{v / 1000:8.2f}" for v in values))
    length = np.diff(np.nanmin(inner[:, 0, 0], axis=-1)).mean() / 1000
    whole = (clocks[clocks > 0].max() - clocks[clocks > 0].min()) / 1000
    return [*lines, f"a layer {length:.2f} us, all marks {whole:.1f} us"]


def main() -> int:
    """Runs the trace."""
    parser = options(__doc__, RANKS)
    parser.add_argument("--raw", type=Path, help="file for the clocks")
    parsed = parser.parse_args()
    config = shape_of(parsed)
    slots = -(-(parsed.context + 1) // CACHE_UNIT) * CACHE_UNIT
    cache = empty_cache(config, parsed.batch, slots, jnp.dtype(jnp.bfloat16))
    weights = weights_for_decoding(config, random_weights(config), parsed.batch, slots)
    size = HEADER + (config.num_layers + 1) * 16 * len(MARKS) * 256
    plans: list[Plan] = []
    with marking(size), _seen_plans(plans):
        step = lower_steps(config, weights, cache, (), 1).compile()
    tokens, positions = (jnp.full((parsed.batch,), n, jnp.int32) for n in (1, parsed.context - 1))
    for _ in range(CALLS):
        cache, _, carried = step(weights, cache, tokens, positions)
    plan, found = plans[-1], np.asarray(jax.device_get(carried.stall))
    shape = (plan.layers + 1, len(plan.steps), len(MARKS), plan.programs)
    clocks = found[HEADER : HEADER + np.prod(shape)].astype(np.uint32).astype(np.int64).reshape(shape)
    if found[0]:
        print(stall_reason(found[:1].tolist()), file=sys.stderr)
        return 1
    if parsed.raw:
        np.savez_compressed(parsed.raw, clocks=clocks)
    print("\n".join(table(plan, clocks)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
