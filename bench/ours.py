"""Measures cases of one model with flashsvd_jax: the process that `decode.py` starts for each.

Takes a job (see `jobs.Job`) as JSON and prints one JSON row a line; a case that fails is a row with an `error`.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import Any

import jax
from case_process import gpu_alone, gpu_beside_others
from cases import Case
from jobs import Job, config_of, ranks_told, serve

from flashsvd_jax.benchmark import measure, measure_end_to_end, read_bandwidth
from flashsvd_jax.compile_cache import enable_persistent_cache
from flashsvd_jax.random_weights import random_weights


def probe() -> dict[str, Any]:
    """The device, and the bytes a second that it reads."""
    return {
        "device": jax.devices()[0].device_kind,
        "backend": jax.default_backend(),
        "bandwidth": read_bandwidth(),
    }


def rows(job: Job) -> Iterator[dict[str, Any]]:
    """One row a case. Peak memory is the process's own, so that it stands in the first row alone."""
    enable_persistent_cache()
    config = config_of(job.cases[0])
    # What XLA tries out is timed, too.
    preparing = gpu_alone if job.autotune else gpu_beside_others
    with preparing():
        weights = jax.block_until_ready(random_weights(config, job.dtype))

    def row(case: Case) -> dict[str, Any]:
        run = measure_end_to_end if case.suite == "end-to-end" else measure
        found = run(
            config, weights, name=case.model, batch=case.batch, context=case.context, new_tokens=case.new_tokens,
            repeats=case.repeats, bandwidth=job.bandwidth, kernels=job.variant, turns=(preparing, gpu_alone),
        )[-1]  # fmt: skip
        peak = found.peak_bytes if case is job.cases[0] else None
        told = dataclasses.asdict(dataclasses.replace(found, peak_bytes=peak)) | {"ranks": ranks_told(case, config)}
        return told if job.autotune else {**told, "prefill_ms": None, "cold_start_s": None, "total_ms": None}

    return serve(job, row)


if __name__ == "__main__":
    if sys.argv[1] == "probe":
        print(json.dumps(probe()), flush=True)
    else:
        for found in rows(Job.from_json(sys.argv[1])):
            print(json.dumps(found), flush=True)
