"""Measures one case of the encoder benchmark with PyTorch and transformers: the process that `encoder.py` starts.

Prints a JSON row.

Plain SVD is what the papers compare with: each projection as two `Linear`. "eager" materialises attention's scores, "sdpa" does
not, "compile" is the latter through `torch.compile`.
"""

import json
import sys
from typing import Any

import torch
import transformers
from encoder_cases import SHAPES, EncoderCase

from peers.pass_timing import timed_row

ATTENTION = {"torch-eager": "eager", "torch-sdpa": "sdpa", "torch-compile": "sdpa"}


def model_of(case: EncoderCase, device: str) -> torch.nn.Module:
    """The model with random weights in bfloat16, its projections split where the case says so."""
    modern = SHAPES[case.model]["model_type"] == "modernbert"
    build = transformers.ModernBertConfig if modern else transformers.BertConfig
    hf = build(**SHAPES[case.model], attn_implementation=ATTENTION[case.impl])
    model = (transformers.ModernBertModel(hf) if modern else transformers.BertModel(hf, add_pooling_layer=False)).eval()
    layers = model.layers if modern else model.encoder.layer
    for layer in layers if case.ratio < 1 else ():
        for name, linear in [*layer.named_modules()]:
            if isinstance(linear, torch.nn.Linear):
                parent, _, own = name.rpartition(".")
                setattr(layer.get_submodule(parent), own, _split(linear, case.ratio))
    return model.to(device, torch.bfloat16)


def _split(linear: torch.nn.Linear, ratio: float) -> torch.nn.Sequential:
    d_in, d_out = linear.in_features, linear.out_features
    rank = max(8, int(ratio * d_in * d_out / (d_in + d_out)) // 8 * 8)  # what cuBLAS is fast with
    return torch.nn.Sequential(
        torch.nn.Linear(d_in, rank, bias=False), torch.nn.Linear(rank, d_out, bias=linear.bias is not None)
    )


def main(case: EncoderCase) -> dict[str, Any]:
    """The row of a case."""
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model_of(case, device)
    tokens = torch.ones((case.batch, case.length), dtype=torch.long, device=device)
    mask = torch.ones_like(tokens)
    run = torch.compile(model) if case.impl == "torch-compile" else model

    def once() -> None:
        run(input_ids=tokens, attention_mask=mask)

    return timed_row(case, once, attention=[ATTENTION[case.impl]])


if __name__ == "__main__":
    print(json.dumps(main(EncoderCase.from_json(sys.argv[1]))), flush=True)
