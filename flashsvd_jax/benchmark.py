"""Measures prompt processing and decoding through the public engine, against the bytes that must be read.

Decoding reads every weight and the keys and values so far once a token; their bytes over the read bandwidth, measured in the
same run, is the floor that each row carries.
"""

import dataclasses
import datetime
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flashsvd_jax.compile_cache import cache_hits, compile_count
from flashsvd_jax.config import ModelConfig
from flashsvd_jax.engine import Engine
from flashsvd_jax.kv_cache import cache_bytes
from flashsvd_jax.models.weights import DecoderWeights
from flashsvd_jax.progress import progress_bar
from flashsvd_jax.sampling import SamplingParams
from flashsvd_jax.shapes import kept_share, rank_layout

Turns = tuple[Callable[[], AbstractContextManager[None]], Callable[[], AbstractContextManager[None]]]
"""What the run that compiles stands in, and what the timed ones do, where several processes share a device."""
NO_TURNS: Turns = (nullcontext, nullcontext)


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement: ``pp`` rows process a prompt, ``tg`` rows generate after one, ``pp+tg`` rows do both. Times in milliseconds.

    ``ms_per_token`` is of one step, which gives a token to every sequence of the batch; ``tokens_per_s`` counts them all.
    ``cold_start_s`` is the first call, which builds ``compiled`` executables, ``cache_hits`` of them from the persistent cache.
    ``floor_ms`` and ``fraction_of_bandwidth`` are of ``tg`` rows alone: processing a prompt is bound by arithmetic.
    ``total_ms`` is from the call to its last token. ``kernels`` says which implementation of each operation ran, ``ranks``
    whether they are ``uniform``, ``mixed`` or ``partly dense`` (or the model ``dense``).
    """

    suite: str
    impl: str
    kernels: str
    model: str
    ratio: float
    ranks: str
    dtype: str
    batch: int
    test: str
    context: int
    new_tokens: int
    ms_per_token: float
    ms_deviation: float
    tokens_per_s: float
    tokens_per_s_deviation: float
    prefill_ms: float
    total_ms: float
    cold_start_s: float
    compiled: int
    cache_hits: int
    bytes_per_token: int
    floor_ms: float | None
    fraction_of_bandwidth: float | None
    read_tb_s: float
    peak_bytes: int | None
    repeats: int
    device: str
    jax: str
    commit: str
    date: str


@dataclasses.dataclass(frozen=True)
class _Timings:
    """Seconds of each repeat: to the first token, of one further step, and to the last token; and what the first call cost."""

    prefill: list[float]
    step: list[float]
    total: list[float]
    cold_start: float
    compiled: int
    cache_hits: int


def measure(
    config: ModelConfig, weights: DecoderWeights, *, name: str, batch: int, context: int, new_tokens: int, repeats: int,
    bandwidth: float, decode_chunk: int = 8, kernels: str = "auto", turns: Turns = NO_TURNS,
) -> list[Row]:  # fmt: skip
    """Processes random prompts of ``context`` tokens, then generates ``new_tokens`` greedily; end tokens do not end it.

    Args:
      config: the model.
      weights: its weights, on the device.
      name: what the rows call it.
      batch: sequences at once.
      context: prompt tokens of each.
      new_tokens: decode steps after the first token.
      repeats: timed runs after one that compiles; times are their medians.
      bandwidth: bytes a second that the device reads, from `read_bandwidth`.
      decode_chunk: tokens per dispatch.
      kernels: as `Engine` takes it; "auto", or the name of an implementation that is tried first.
      turns: what the run that compiles and the timed ones stand in, where several processes share the device.

    Returns:
      A ``pp`` row and a ``tg`` row.
    """
    length = context + new_tokens + 1
    engine = Engine(config, weights, batch=batch, max_length=length, decode_chunk=decode_chunk, kernels=kernels)
    times = _time(engine, f"{name}, batch {batch}, context {context}", context, new_tokens, repeats, turns)
    read = bytes_per_token(config, weights, batch, context + new_tokens // 2)
    common = {
        **_common(engine, times, kernels), "model": name, "context": context, "new_tokens": new_tokens,
        "bytes_per_token": read, "read_tb_s": round(bandwidth / 1e12, 3),
    }  # fmt: skip
    floor = read / bandwidth
    prefill, step = times.prefill, times.step
    return [
        Row(
            suite="prefill", test=f"pp{context}", ms_per_token=_ms(prefill) / context, ms_deviation=_deviation(prefill) / context,
            tokens_per_s=round(batch * context / statistics.median(prefill), 1),
            tokens_per_s_deviation=_rate_deviation(prefill, batch * context), floor_ms=None, fraction_of_bandwidth=None, **common,
        ),
        Row(
            suite="decode", test=f"tg{new_tokens} @ d{context}", ms_per_token=_ms(step), ms_deviation=_deviation(step),
            tokens_per_s=round(batch / statistics.median(step), 1), tokens_per_s_deviation=_rate_deviation(step, batch),
            floor_ms=round(1e3 * floor, 4), fraction_of_bandwidth=round(floor / statistics.median(step), 4), **common,
        ),
    ]  # fmt: skip


def measure_end_to_end(
    config: ModelConfig, weights: DecoderWeights, *, name: str, batch: int, context: int, new_tokens: int, repeats: int,
    bandwidth: float, decode_chunk: int = 8, kernels: str = "auto", turns: Turns = NO_TURNS,
) -> list[Row]:  # fmt: skip
    """One request as a user waits for it: a prompt of ``context`` tokens and ``new_tokens`` (at least 2), the first included.

    Arguments are those of `measure`. Returns one ``pp+tg`` row: ``total_ms`` is the wait, ``ms_per_token`` its share of a token.
    """
    length = context + new_tokens
    engine = Engine(config, weights, batch=batch, max_length=length, decode_chunk=decode_chunk, kernels=kernels)
    times = _time(engine, f"{name}, {context} + {new_tokens} tokens", context, new_tokens - 1, repeats, turns)
    total = times.total
    return [
        Row(
            suite="end-to-end", test=f"pp{context}+tg{new_tokens}", model=name, context=context, new_tokens=new_tokens,
            ms_per_token=round(_ms(total) / new_tokens, 4), ms_deviation=round(_deviation(total) / new_tokens, 4),
            tokens_per_s=round(batch * new_tokens / statistics.median(total), 1),
            tokens_per_s_deviation=_rate_deviation(total, batch * new_tokens),
            bytes_per_token=bytes_per_token(config, weights, batch, context + new_tokens // 2),
            floor_ms=None, fraction_of_bandwidth=None, read_tb_s=round(bandwidth / 1e12, 3), **_common(engine, times, kernels),
        )
    ]  # fmt: skip


def bytes_per_token(config: ModelConfig, weights: DecoderWeights, batch: int, length: int) -> int:
    """Bytes a decode step must read: weights, and keys and values so far."""
    return sum(a.nbytes for a in weights.read_by_a_step()) + cache_bytes(
        config, batch, length, weights.embedding.dtype.itemsize
    )


def read_bandwidth() -> float:
    """Bytes a second of a plain sum over an array far larger than any cache, the best of several runs."""
    size = 2**31 if jax.default_backend() == "gpu" else 2**28
    x = jnp.ones((size // 2**14, 2**13), jnp.bfloat16)
    total = jax.jit(lambda x: x.sum(axis=1, dtype=jnp.float32))
    total(x).block_until_ready()
    best = float("inf")
    for _ in range(5):
        clock = time.perf_counter()
        for _ in range(10):
            y = total(x)
        y.block_until_ready()
        best = min(best, (time.perf_counter() - clock) / 10)
    return x.nbytes / best


def _time(engine: Engine, what: str, context: int, steps: int, repeats: int, turns: Turns) -> _Timings:
    """Runs random prompts of ``context`` tokens with ``steps`` decode steps: once to compile, then ``repeats`` times."""
    prompts = np.random.default_rng(0).integers(0, engine.config.vocab_size, (engine.batch, context)).tolist()
    with progress_bar(what, total=repeats + 1, unit=" runs") as bar:
        preparing, timing = turns
        with preparing():
            compiled, hits, clock = compile_count(), cache_hits(), time.perf_counter()
            _run(engine, prompts, steps)
            cold = time.perf_counter() - clock
            compiled, hits = compile_count() - compiled, cache_hits() - hits
        times = []
        with timing():
            for _ in range(repeats):
                bar.update()
                times.append(_run(engine, prompts, steps))
    prefill, step, total = (list(column) for column in zip(*times, strict=True))
    return _Timings(prefill, step, total, cold, compiled, hits)


def _run(engine: Engine, prompts: Sequence[Sequence[int]], steps: int) -> tuple[float, float, float]:
    """(seconds until the first token, seconds per further step, seconds until the last token)."""
    params = [SamplingParams(temperature=0.0, max_tokens=steps + 1, ignore_eos=True)] * len(prompts)
    clock = time.perf_counter()
    blocks = engine.generate(prompts, params)
    next(blocks)
    first = time.perf_counter()
    for _ in blocks:
        pass
    last = time.perf_counter()
    return first - clock, (last - first) / steps, last - clock


def _common(engine: Engine, times: _Timings, kernels: str) -> dict[str, Any]:
    """What all rows of one set of runs share."""
    return {
        "impl": "flashsvd_jax" if kernels == "auto" else f"flashsvd_jax-{kernels}",
        "kernels": ", ".join(f"{op}={'+'.join(sorted(used))}" for op, used in sorted(engine.kernels_used.items())),
        "ratio": kept_share(engine.config), "ranks": rank_layout(engine.config),
        "dtype": engine.weights.embedding.dtype.name, "batch": engine.batch, "prefill_ms": _ms(times.prefill),
        "total_ms": _ms(times.total), "cold_start_s": round(times.cold_start, 2), "compiled": times.compiled,
        "cache_hits": times.cache_hits, "peak_bytes": _peak_bytes(), "repeats": len(times.total),
        "device": jax.devices()[0].device_kind, "jax": jax.__version__, **provenance(),
    }  # fmt: skip


def _ms(seconds: Sequence[float]) -> float:
    return round(1e3 * statistics.median(seconds), 4)


def _deviation(seconds: Sequence[float]) -> float:
    return round(1e3 * statistics.stdev(seconds), 4) if len(seconds) > 1 else 0.0


def _rate_deviation(seconds: Sequence[float], tokens: int) -> float:
    return round(statistics.stdev([tokens / s for s in seconds]), 1) if len(seconds) > 1 else 0.0


def _peak_bytes() -> int | None:
    """Most device memory in use at once since the process began; None where the device does not say."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def provenance() -> dict[str, str]:
    """``commit`` of the measured checkout and ``date`` of now, in UTC."""
    return {"commit": _commit(), "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}


def _commit() -> str:
    """The checkout's commit, from the environment where the measured copy has no history."""
    given = os.environ.get("FLASHSVD_COMMIT")
    if given:
        return given
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no git on this machine
        return "unknown"
    return result.stdout.strip() if result.returncode == 0 else "unknown"
