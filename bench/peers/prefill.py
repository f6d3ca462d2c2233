"""Measures one case of the benchmark of prompts with PyTorch: the process that `prefill.py` starts. Prints a JSON row."""

import json
import sys
from typing import Any

import torch
from case_process import gpu_alone
from prefill_cases import PrefillCase
from prompt_cases import median_seconds, row_of

from peers.model import PeerModel
from peers.run import random_tensors, rounded_ranks


def main(case: PrefillCase) -> dict[str, Any]:
    """The row of a case: SDPA, projections of one input packed, eager or through `torch.compile`."""
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = rounded_ranks(case.config)
    model = PeerModel(config, random_tensors(config, torch.bfloat16, device), case.batch, case.length + 1, True)
    prompt = torch.ones((case.batch, case.length), dtype=torch.long, device=device)
    prefill = torch.compile(model.prefill) if case.impl == "torch-compile" else model.prefill

    def run() -> None:
        prefill(prompt)
        if device == "cuda":
            torch.cuda.synchronize()

    if case.impl == "torch-compile":
        run()  # compiles for long, and uses the GPU for one pass alone
    held = peak = None
    with gpu_alone():
        run()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        latency = median_seconds(run, case.repeats)
        if held is not None:
            peak = torch.cuda.max_memory_allocated() - held
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    row = row_of(case, latency, ["sdpa"], peak_activation_bytes=peak)
    return {**row, "matmul_tflops": None, "device": name, "torch": torch.__version__}


if __name__ == "__main__":
    print(json.dumps(main(PrefillCase.from_json(sys.argv[1]))), flush=True)
