"""Takes the persistent decode kernel apart: a step's time as it is, with parts of it left out, and with other sizes.

What is left out makes the results wrong, and the time of what remains visible: "no waits" is loading and multiplying alone, "no
copies" the chain of waits and products alone. Appends a row a variant (suite "persistent") to
bench/results/<device>/kernels.jsonl, and prints a table.
"""

import contextlib
import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jobs import append_row
from one_shape import RANKS, options, rows_file, shape_of

from flashsvd_jax.benchmark import bytes_per_token, provenance, read_bandwidth
from flashsvd_jax.config import ModelConfig
from flashsvd_jax.decode_loop import loop_options
from flashsvd_jax.kv_cache import CACHE_UNIT, KVCache, empty_cache
from flashsvd_jax.models import decoder
from flashsvd_jax.models.absorption import weights_for_decoding, with_absorbed
from flashsvd_jax.models.weights import DecoderWeights
from flashsvd_jax.random_weights import random_weights
from pallas_kernels import prefer
from pallas_kernels.persistent import building, code, copies, launch, layers, loading, phases, plan, tuning, words
from pallas_kernels.target import target

STEPS, CALLS, REPEATS = 8, 3, 8
Patch = tuple[Any, str, Any]


def _at_once(reads: Sequence[words.Read], patience: Any) -> list[list[Any]]:
    always = code.equal(code.integer(0), code.integer(0))
    return [read.values(read.load(always, read.words)) for read in reads]


def _nothing_copied(to: Any, barrier: Any, *rest: Any) -> None:
    with code.when(rest[-1]):
        copies.arrive(barrier)


NO_WAITS: Patch = (launch, "until_written", _at_once)
NO_COPIES: Patch = (copies, "copy_tile", _nothing_copied)


def _splits(change: Callable[[int], int]) -> Patch:
    return phases, "splits_for", lambda *sizes: change(plan.splits_for(*sizes))


def _parts(change: Callable[[int], int]) -> Patch:
    return building, "parts_for", lambda *sizes: change(plan.parts_for(*sizes))


def _tuning(**sizes: float) -> Patch:
    return layers, "tuning_for", lambda *of: dataclasses.replace(tuning.tuning_for(*of), **sizes)


def _cores(count: int) -> Patch:
    return layers, "target", lambda: dataclasses.replace(target(), cores=count)


BY_COUNT = _tuning(kilobyte_tiles=0)
"""Phases divided so that each program has an item: else the division by cost finds its own way, whatever it begins with."""

VARIANTS: dict[str, tuple[Patch, ...]] = {
    "as it is": (),
    "no waits": (NO_WAITS,),
    "no copies": (NO_COPIES,),
    "no waits or copies": (NO_WAITS, NO_COPIES),
    "nothing fetched ahead": ((loading, "fetch_ahead", lambda *arguments: None),),
    "2 tiles in flight": (_tuning(tiles_in_flight=2),),
    "3 tiles in flight": (_tuning(tiles_in_flight=3),),
    "3.5 tiles in flight": (_tuning(tiles_in_flight=3.5),),
    "4 tiles in flight": (_tuning(tiles_in_flight=4),),
    "64 words at once": (_tuning(words_at_once=64),),
    "96 words at once": (_tuning(words_at_once=96),),
    "160 words at once": (_tuning(words_at_once=160),),
    "inputs of 8 tiles": (_tuning(largest_input=8),),
    "inputs of 16 tiles": (_tuning(largest_input=16),),
    "whole row tiles from 8 on": (_tuning(kilobyte_tiles=0, whole_row_tiles=8),),
    "shares even": (_tuning(kilobyte_tiles=0, uneven_tiles=0),),
    "shares uneven by 3": (_tuning(kilobyte_tiles=0, uneven_tiles=3),),
    "shares uneven by 6": (_tuning(kilobyte_tiles=0, uneven_tiles=6),),
    "all row tiles whole": (_tuning(kilobyte_tiles=0, whole_row_tiles=0),),
    "one warpgroup reads": (_tuning(readers=1),),
    "two warpgroups read": (_tuning(readers=2),),
    "not divided by cost": (BY_COUNT,),
    "words cost thrice as much": (_tuning(kilobyte_tiles=0.1),),
    "half the splits": (BY_COUNT, _splits(lambda found: max(1, found // 2))),
    "twice the splits": (BY_COUNT, _splits(lambda found: min(8, found * 2))),
    "128 programs": (_cores(128),),
    "nothing fetched before": ((layers, "MOST_FETCHED", 0),),
    "tiles stay in the cache": ((copies, "TILE_POLICY", "evict_normal"),),
    "nothing absorbed": (),
    "absorbed": (),
    "half the parts": (_parts(lambda found: max(1, found // 2)),),
}


@contextlib.contextmanager
def patched(patches: Sequence[Patch]) -> Iterator[None]:
    """With parts of the kernel replaced, for as long as it is traced."""
    with contextlib.ExitStack() as stack:
        layers.forget_plans()
        stack.callback(layers.forget_plans)
        for owner, name, value in patches:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def lower_steps(
    config: ModelConfig, weights: DecoderWeights, cache: KVCache, patches: Sequence[Patch], count: int, **lowering: Any
) -> Any:
    """Steps of decoding with the persistent kernel, so replaced, all at the same position. Fails where the kernel refuses.

    Several of them in one program, as a host may take longer to send a step, of hundreds of arrays, than the step takes.
    """

    def steps(weights: DecoderWeights, cache: KVCache, tokens: jax.Array, positions: jax.Array) -> Any:
        def step(_: jax.Array, found: Any) -> Any:
            cache, _, carried = found
            return decoder.decode(config, weights, cache, tokens, positions, carried=carried)

        no_logits = jnp.zeros((tokens.shape[0], config.vocab_size), jnp.float32)
        cache, carried = decoder.begin(config, weights, cache, tokens, positions)
        return jax.lax.fori_loop(0, count, step, (cache, no_logits, carried))

    numbers = jax.ShapeDtypeStruct((cache.keys[0].shape[0],), jnp.int32)
    with patched(patches), prefer("persistent"):
        jitted = jax.jit(steps, donate_argnums=1, compiler_options=loop_options())
        return jitted.trace(weights, cache, numbers, numbers).lower(**lowering)


def weights_of(
    variants: Sequence[str], config: ModelConfig, weights: DecoderWeights, cache: KVCache
) -> dict[str, DecoderWeights]:
    """What each decodes with: what the engine would, unless its name says otherwise. Made once, whoever has it."""
    batch, _, slots, _ = cache.keys[0].shape
    absorbed = functools.cache(lambda: with_absorbed(weights))
    chosen = functools.cache(lambda: weights_for_decoding(config, weights, batch, slots))
    found = {}
    for name in variants:
        parts = name.split("+")
        found[name] = weights if "nothing absorbed" in parts else absorbed() if "absorbed" in parts else chosen()
    return found


def microseconds(
    steps: dict[str, Any], weights: dict[str, DecoderWeights], cache: KVCache, position: int
) -> dict[str, float]:
    """Of each variant the median time of a step; all are timed in turn, so that none has a part of the run to itself."""
    batch = cache.keys[0].shape[0]
    tokens, positions = jnp.ones((batch,), jnp.int32), jnp.full((batch,), position, jnp.int32)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(1 + REPEATS):
        for name, variant in steps.items():
            jax.block_until_ready(cache)
            start = time.perf_counter()
            for _ in range(CALLS):
                cache, logits, _ = variant(weights[name], cache, tokens, positions)
            jax.block_until_ready(logits)
            times[name].append(1e6 * (time.perf_counter() - start) / (CALLS * STEPS))
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def compiled(config: ModelConfig, weights: dict[str, DecoderWeights], cache: KVCache) -> dict[str, Any]:
    """Each variant's steps. Traced one after the other, as tracing is what is patched, and compiled side by side."""
    with ThreadPoolExecutor() as pool:
        found = {}
        for name, own in weights.items():
            patches = [patch for part in name.split("+") for patch in VARIANTS[part]]
            found[name] = pool.submit(lower_steps(config, own, cache, patches, STEPS).compile)
        return {name: future.result() for name, future in found.items()}


def main() -> int:
    """Runs the measurement."""
    parser = options(__doc__, RANKS)
    parser.add_argument("--variants", default=",".join(VARIANTS), metavar="NAME+NAME,..", help="all if not given")
    parsed = parser.parse_args()
    out = rows_file(parsed.out)
    if out is None:
        return 1
    config = shape_of(parsed)
    weights, bandwidth = random_weights(config), read_bandwidth()
    cache = empty_cache(
        config, parsed.batch, -(-(parsed.context + 1) // CACHE_UNIT) * CACHE_UNIT, jnp.dtype(jnp.bfloat16)
    )
    floor = 1e6 * bytes_per_token(config, weights, parsed.batch, parsed.context) / bandwidth
    common = {"suite": "persistent", "model": parsed.model, "ratio": parsed.ratio, "ranks": parsed.ranks}
    common |= {"batch": parsed.batch, "context": parsed.context, "floor_us": round(floor, 1)}
    common |= {"jax": jax.__version__, **provenance()}
    of_variants = weights_of(parsed.variants.split(","), config, weights, cache)
    steps = compiled(config, of_variants, cache)
    for name, us in microseconds(steps, of_variants, cache, parsed.context - 1).items():
        append_row(out, common | {"variant": name, "us": round(us, 1)})
        print(f"{name:<40} {us:8.1f} us, floor {floor:8.1f} us", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
