"""Times every kernel of a decoder layer inside the CUDA graph, beside the time that its bytes take.

Takes a profile of the engine's decode step, with command buffers on, as they are in use. Appends a row a kernel (suite "kernel")
to bench/results/<device>/kernels.jsonl, and prints a table.
"""

import collections
import dataclasses
import gzip
import itertools
import json
import os
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jobs import append_row
from one_shape import options, rows_file

from flashsvd_jax.benchmark import provenance, read_bandwidth
from flashsvd_jax.engine import Engine
from flashsvd_jax.kv_cache import cache_bytes
from flashsvd_jax.models.weights import DecoderWeights, LayerWeights
from flashsvd_jax.random_weights import random_weights
from flashsvd_jax.sampling import SamplingParams
from flashsvd_jax.shapes import shape_config

Event = dict[str, Any]
ATTENTION = re.compile(r"attend(_\d+|__\d+)?")  # XLA numbers kernels of one name
GRAPHS_IN_PROFILES = "--xla_enable_command_buffers_during_profiling=true"


@dataclasses.dataclass(frozen=True)
class KernelTime:
    """One kernel of a layer, in order: from its start to the start of the next."""

    kernel: str
    us: float
    bytes: int | None


def kernel_events(trace: dict[str, Any]) -> list[Event]:
    """What ran on the GPU's streams, in order of start; ``trace`` is a profile in Chrome's format."""
    events = trace["traceEvents"]
    threads = {(e["pid"], e.get("tid")): e["args"]["name"] for e in events if e.get("name") == "thread_name"}
    processes = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"}

    def on_gpu(event: Event) -> bool:
        stream = threads.get((event.get("pid"), event.get("tid")), "")
        return event.get("ph") == "X" and "GPU" in processes.get(event.get("pid"), "") and "Stream" in stream

    return sorted(filter(on_gpu, events), key=lambda event: event["ts"])


def layers(events: Sequence[Event], attention: re.Pattern[str] = ATTENTION) -> list[Sequence[Event]]:
    """The kernels of each layer that is followed by another, from its attention to the next one's, which is included."""
    starts = [i for i, event in enumerate(events) if attention.fullmatch(event["name"])]
    found = [events[a : b + 1] for a, b in itertools.pairwise(starts)]
    usual = collections.Counter(map(len, found)).most_common(1)  # between two steps there is more
    return [layer for layer in found if len(layer) == usual[0][0]] if usual else []


def product_bytes(layer: LayerWeights) -> Iterator[int]:
    """Bytes that the layer's products read, in the order of their kernels."""
    for packed in (layer.o, layer.gate_up, layer.down, layer.qkv):
        yield packed.first.nbytes
        ups = [up.nbytes for up in packed.ups if up is not None]
        if ups:
            yield sum(ups)


def kernel_times(found: Sequence[Sequence[Event]], layer: LayerWeights, cache: int) -> list[KernelTime]:
    """Means over layers, each kernel with the bytes of weights, or of the ``cache`` of a layer, that it reads.

    Raises:
      ValueError: the kernels are not those of a layer with these weights.
    """
    weights, times = list(product_bytes(layer)), []
    for i in range(len(found[0]) - 1):
        name = found[0][i]["name"]
        us = statistics.mean(kernels[i + 1]["ts"] - kernels[i]["ts"] for kernels in found)
        if name.startswith("project_"):
            if not weights:
                raise ValueError(f"more products than a layer has, the first of them {name}")
            times.append(KernelTime(name, us, weights.pop(0)))
        else:
            times.append(KernelTime(name, us, cache if ATTENTION.fullmatch(name) else None))
    if weights:
        raise ValueError(f"{len(weights)} products of a layer were not found among {[e['name'] for e in found[0]]}")
    return times


def profile(engine: Engine, context: int) -> list[Event]:
    """Kernels of a few dispatches after prompts of ``context`` tokens."""
    params = SamplingParams(temperature=0.0, max_tokens=4 * engine.decode_chunk, ignore_eos=True)
    prompts = np.random.default_rng(0).integers(0, engine.config.vocab_size, (engine.batch, context)).tolist()
    blocks = engine.generate(prompts, [params] * engine.batch)
    next(blocks), next(blocks)
    return profiled(lambda: [*blocks])


def profiled(run: Callable[[], object]) -> list[Event]:
    """Kernels that ran during a call, which waits for them."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (file,) = Path(folder).rglob("*.trace.json.gz")
        return kernel_events(json.loads(gzip.decompress(file.read_bytes())))


def measure(model: str, ratio: float, batch: int, context: int, bandwidth: float) -> list[dict[str, Any]]:
    """Rows of one model."""
    config = shape_config(model, ratio)
    weights: DecoderWeights = random_weights(config)
    engine = Engine(config, weights, batch=batch, max_length=context + 65, kernels="products")
    cache = cache_bytes(config, batch, context) // config.num_layers
    common = {"suite": "kernel", "model": model, "ratio": ratio, "batch": batch, "context": context} | provenance()
    rows = []
    for time in kernel_times(layers(profile(engine, context)), weights.layers[0], cache):
        floor = None if time.bytes is None else 1e6 * time.bytes / bandwidth
        share = None if floor is None else round(floor / time.us, 4)
        figures = {"us": round(time.us, 2), "floor_us": floor and round(floor, 2), "fraction_of_bandwidth": share}
        rows.append(
            common | {"kernel": time.kernel, "bytes": time.bytes, **figures, "read_tb_s": round(bandwidth / 1e12, 3)}
        )
    return rows


def main() -> int:
    """Runs the measurement."""
    parsed = options(__doc__).parse_args()
    # Read when XLA starts: a profile would otherwise be of kernels that are sent one by one.
    os.environ["XLA_FLAGS"] = f"{GRAPHS_IN_PROFILES} {os.environ.get('XLA_FLAGS', '')}"
    out = rows_file(parsed.out)
    if out is None:
        return 1
    rows = measure(parsed.model, parsed.ratio, parsed.batch, parsed.context, read_bandwidth())
    for row in rows:
        append_row(out, row)
        print(f"{row['kernel']:<28} {row['us']:8.2f} us, floor {row['floor_us'] or 0:8.2f} us")
    print(
        f"{'a layer':<28} {sum(row['us'] for row in rows):8.2f} us, floor {sum(row['floor_us'] or 0 for row in rows):8.2f} us"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
