"""Measures one case of the benchmark of prompts with PyTorch: the process that `prefill.py` starts. Prints a JSON row."""

import json
import sys
from typing import Any

import torch
from prefill_cases import PrefillCase

from peers.model import PeerModel
from peers.pass_timing import timed_row
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

    return timed_row(case, lambda: prefill(prompt), attention=["sdpa"])


if __name__ == "__main__":
    print(json.dumps(main(PrefillCase.from_json(sys.argv[1]))), flush=True)
