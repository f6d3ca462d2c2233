"""Measures cases of one model with one PyTorch variant: the process that `decode.py` starts for each.

Takes a job (see `jobs.Job`) as JSON and prints one JSON row a line; a case that fails is a row with an `error`.
"""

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from case_process import gpu_alone, gpu_beside_others
from cases import Case
from jobs import Job, config_of, described, serve

from flashsvd_jax.config import ModelConfig
from flashsvd_jax.factorization import Factorization
from flashsvd_jax.kv_cache import cache_bytes
from flashsvd_jax.schema import schema
from peers.model import PeerModel
from peers.steps import VARIANTS, Step, greedy

# cuBLAS is slow with rows that are not whole 16-byte words; ranks are rounded down, so that a peer reads no more than asked.
RANK_MULTIPLE = 8


def rounded_ranks(config: ModelConfig, multiple: int = RANK_MULTIPLE) -> ModelConfig:
    """The same model with every rank rounded down to a multiple."""
    ranks = {site: max(multiple, rank // multiple * multiple) for site, rank in config.factorization.ranks}
    return dataclasses.replace(config, factorization=Factorization.of(ranks))


def random_tensors(config: ModelConfig, dtype: torch.dtype, device: str) -> Callable[[str], torch.Tensor]:
    """Flat name -> tensor, scaled so that activations neither vanish nor explode."""
    specs = schema(config)

    def get(name: str) -> torch.Tensor:
        shape = specs[name].shape
        if name.endswith(".scale"):
            return torch.ones(shape, dtype=dtype, device=device)
        return torch.randn(shape, dtype=dtype, device=device) * shape[-1] ** -0.5

    return get


def bytes_per_token(config: ModelConfig, model: PeerModel, length: int) -> int:
    """Bytes a decode step must read, by the rule of our own rows: weights but the embedding, keys and values so far."""
    weights = sum(p.nbytes for name, p in model.named_parameters() if name != "embedding")
    return weights + cache_bytes(config, model.batch, length, model.embedding.element_size())


def timed(model: PeerModel, step: Step, prompt: torch.Tensor, steps: int) -> tuple[float, float, float]:
    """(seconds until the first token, seconds per further step, seconds until the last token)."""
    wait: Callable[[], Any] = torch.cuda.synchronize if prompt.is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    token = greedy(model.prefill(prompt))
    position = torch.tensor([prompt.shape[1]], device=prompt.device)
    wait()
    first = time.perf_counter()
    for _ in range(steps):
        token = step(token, position)
        position = position + 1
    wait()
    last = time.perf_counter()
    return first - start, (last - first) / steps, last - start


def measure(job: Job, case: Case, device: str) -> dict[str, Any]:
    """The row of a case; times are medians of its repeats after two runs that warm up."""
    is_request = case.suite == "end-to-end"
    steps = case.new_tokens - 1 if is_request else case.new_tokens
    config, variant = rounded_ranks(config_of(case)), VARIANTS[job.variant]
    get = random_tensors(config, getattr(torch, job.dtype), device)
    with gpu_beside_others():
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        model = PeerModel(config, get, case.batch, case.context + steps + 1, variant.is_packed)
        prompt = torch.randint(0, config.vocab_size, (case.batch, case.context), device=device)
        step = variant.build(model)
        clock = time.perf_counter()
        timed(model, step, prompt, steps)
        cold = time.perf_counter() - clock
    with gpu_alone():
        timed(model, step, prompt, steps)
        prefill, per_step, total = zip(*(timed(model, step, prompt, steps) for _ in range(case.repeats)), strict=True)
    read = bytes_per_token(config, model, case.context + case.new_tokens // 2)
    tokens = case.batch * (case.new_tokens if is_request else 1)
    waited = statistics.median(total if is_request else per_step)
    floor = None if is_request else read / job.bandwidth
    return {
        **described(job, case), "ms_per_token": _ms(waited / case.new_tokens if is_request else waited),
        "tokens_per_s": round(tokens / waited, 1), "prefill_ms": _ms(statistics.median(prefill)),
        "total_ms": _ms(statistics.median(total)), "cold_start_s": round(cold, 2), "bytes_per_token": read,
        "floor_ms": None if floor is None else _ms(floor),
        "fraction_of_bandwidth": None if floor is None else round(floor / waited, 4),
        "read_tb_s": round(job.bandwidth / 1e12, 3), "rank_multiple": RANK_MULTIPLE, "repeats": case.repeats,
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None, "torch": torch.__version__,
    }  # fmt: skip


def main(job: Job) -> None:
    """Prints the rows of a job."""
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def row(case: Case) -> dict[str, Any]:
        torch.compiler.reset()  # graphs of an earlier case hold its memory
        return measure(job, case, device)

    for found in serve(job, row):
        print(json.dumps(found), flush=True)


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 4)


if __name__ == "__main__":
    main(Job.from_json(sys.argv[1]))
