"""Measures one case of the encoder benchmark with flashsvd_jax: the process that `encoder.py` starts. Prints a JSON row."""

import json
import statistics
import sys
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from encoder_cases import EncoderCase

from flashsvd_jax.benchmark import random_arrays
from flashsvd_jax.compile_cache import enable_persistent_cache
from flashsvd_jax.models.encoder import hidden_states
from flashsvd_jax.models.encoder_weights import build_encoder_weights
from pallas_kernels import hardware_rank, record
from pallas_kernels.registry import Record


def seconds(run: Any, repeats: int) -> float:
    """The median time of a call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def matrix_rate() -> float:
    """Operations a second of a large product."""
    size = 8192 if jax.default_backend() == "gpu" else 256
    x = jnp.ones((size, size), jnp.bfloat16)
    product = jax.jit(lambda x: x @ x)
    jax.block_until_ready(product(x))
    return 2 * size**3 / seconds(lambda: product(x), 10)


def main(case: EncoderCase) -> dict[str, Any]:
    """The row of a case."""
    enable_persistent_cache()
    weights, used = build_encoder_weights(case.config, random_arrays(case.config), hardware_rank), Record()
    tokens = jnp.ones((case.batch, case.length), jnp.int32)
    lengths = jnp.full((case.batch,), case.length, jnp.int32)
    with record(used):
        compiled = jax.jit(partial(hidden_states, case.config)).lower(weights, tokens, lengths).compile()
    memory = compiled.memory_analysis()
    jax.block_until_ready(compiled(weights, tokens, lengths))
    latency = seconds(lambda: compiled(weights, tokens, lengths), case.repeats)
    held = sum(a.nbytes for a in jax.tree.leaves((weights, tokens, lengths)))
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {
        **case.described(), "device": jax.devices()[0].device_kind, "attention": sorted(used["attend_padded"]),
        "latency_ms": round(1e3 * latency, 3), "tokens_per_s": round(case.batch * case.length / latency, 1),
        "temp_bytes": memory.temp_size_in_bytes if memory else None,
        "peak_activation_bytes": None if peak is None else peak - held,
        "tflops": round(case.flops() / latency / 1e12, 2), "matmul_tflops": round(matrix_rate() / 1e12, 1),
        "jax": jax.__version__,
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(main(EncoderCase.from_json(sys.argv[1]))), flush=True)
