"""How a pass of a whole batch is timed in JAX, and the rate of large products that it is compared with."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from case_process import gpu_alone
from prompt_cases import PromptCase, median_seconds, row_of, warm_up


def matrix_rate() -> float:
    """Operations a second of a chain of large products of random numbers; of zeros or ones it would be higher."""
    size = 8192 if jax.default_backend() == "gpu" else 256
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    product, calls = jax.jit(lambda x: x @ x), 10
    jax.block_until_ready(product(x))
    return calls * 2 * size**3 / median_seconds(lambda: jax.block_until_ready([product(x) for _ in range(calls)]), 5)


def timed_row(
    case: PromptCase, lowered: jax.stages.Lowered, draw: Callable[[], tuple[Any, ...]], attention: Sequence[str]
) -> dict[str, Any]:
    """The row of a lowered pass over what ``draw`` puts on the device. Its peak is the process's own: one case a process."""
    with gpu_alone():
        operands, compiled = draw(), lowered.compile()
        once = lambda: jax.block_until_ready(compiled(*operands))  # noqa: E731
        warm_up(once, jax.default_backend() == "gpu")
        latency = median_seconds(once, case.repeats)
        peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        rate = round(matrix_rate() / 1e12, 1)
    memory = compiled.memory_analysis()
    held = sum(a.nbytes for a in jax.tree.leaves(operands))
    row = row_of(
        case, latency, attention, temp_bytes=memory.temp_size_in_bytes if memory else None,
        peak_activation_bytes=None if peak is None else peak - held,
    )  # fmt: skip
    return {**row, "matmul_tflops": rate, "device": jax.devices()[0].device_kind, "jax": jax.__version__}
