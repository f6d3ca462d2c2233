"""Compresses the bundled model as SVD-LLM v1 ("whitening only") does, and saves it as that project's files are saved.

For a projection W with calibration inputs X: G = X^T X = S S^T (Cholesky), W S = U Sigma V^T, cut to
`rank = int(out * in * ratio / (out + in))`; the factors are `u = U sqrt(Sigma)` and `v = sqrt(Sigma) V^T S^-1`. The
inputs are those of the dense model, all layers in one pass, as the published whitening profiles the original model. G
is accumulated and factorized in float64. The published files are float32 or float16; this one is float16.
"""

import argparse
import contextlib
import copy
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import svd_llama
import torch
import transformers
from torch import nn
from transformers import AutoTokenizer, LlamaForCausalLM

BUNDLED = Path(__file__).resolve().parents[2] / "flashsvd_jax" / "bundled"
WORK = Path(__file__).resolve().parent / ".work"
ATTENTION, MLP = ("q", "k", "v", "o"), ("gate", "up", "down")


class Factors(NamedTuple):
    """A projection's two factors: u [d_out, rank] and v [rank, d_in]."""

    u: torch.Tensor
    v: torch.Tensor


def parameter_rank(d_out: int, d_in: int, ratio: float) -> int:
    """The rank at which two factors hold `ratio` of a matrix's parameters, rounded down as published."""
    return int(d_out * d_in * ratio / (d_out + d_in))


def projections(model: LlamaForCausalLM) -> Iterator[tuple[str, nn.Linear]]:
    """Yields (name, module) of every projection inside the layers, such as `model.layers.0.self_attn.q_proj`."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            yield name, module


@torch.no_grad()
def input_grams(model: LlamaForCausalLM, batches: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Runs the model on token batches and returns X^T X in float64 for the inputs X of each projection."""
    grams: dict[str, torch.Tensor] = {}
    handles = []
    for name, module in projections(model):
        gram = grams[name] = torch.zeros(module.in_features, module.in_features, dtype=torch.float64)

        def add(_module: nn.Module, inputs: tuple[torch.Tensor, ...], gram: torch.Tensor = gram) -> None:
            x = inputs[0].flatten(0, -2).double()
            gram.addmm_(x.T, x)

        handles.append(module.register_forward_pre_hook(add))
    for tokens in batches:
        model.model(tokens)
    for handle in handles:
        handle.remove()
    return grams


def cholesky(gram: torch.Tensor) -> torch.Tensor:
    """Lower Cholesky factor; where `gram` is not positive definite its spectrum is lifted just above zero first."""
    factor, failed = torch.linalg.cholesky_ex(gram)
    if not failed:
        return factor
    lift = 1e-6 - torch.linalg.eigvalsh(gram)[0]
    return torch.linalg.cholesky(gram + lift * torch.eye(len(gram), dtype=gram.dtype))


def factorize(weight: torch.Tensor, gram: torch.Tensor, rank: int) -> Factors:
    """The best factors of `rank` for the inputs that `gram` describes, in float64."""
    scale = cholesky(gram)
    u, sigma, vt = torch.linalg.svd(weight.double() @ scale, full_matrices=False)
    root = sigma[:rank].sqrt()
    v = torch.linalg.solve_triangular(scale, vt[:rank], upper=False, left=False)
    return Factors(u[:, :rank] * root, root[:, None] * v)


def compress(model: LlamaForCausalLM, batches: list[torch.Tensor], ratio: float) -> dict[str, int]:
    """Replaces attention and MLP modules of `model` by factorized ones, in place; returns each projection's rank."""
    model.set_attn_implementation("eager")  # its mask, additive and always there, is what our modules take
    grams = input_grams(model, batches)
    factors = {}
    for name, module in projections(model):
        rank = parameter_rank(module.out_features, module.in_features, ratio)
        factors[name] = factorize(module.weight.detach(), grams[name], rank)
    ranks = {name: len(pair.v) for name, pair in factors.items()}
    for index, layer in enumerate(model.model.layers):
        prefix = f"model.layers.{index}"
        attention_ranks = {name: ranks[f"{prefix}.self_attn.{name}_proj"] for name in ATTENTION}
        mlp_ranks = {name: ranks[f"{prefix}.mlp.{name}_proj"] for name in MLP}
        layer.self_attn = svd_llama.SVD_LlamaAttention(model.config, attention_ranks, index)
        layer.mlp = svd_llama.SVD_LlamaMLP(model.config, mlp_ranks)
    for name, pair in factors.items():
        for part, value in pair._asdict().items():
            linear = model.get_submodule(name.removesuffix("_proj") + f"_{part}_proj")
            linear.weight = nn.Parameter(value.float())
    return ranks


@torch.no_grad()
def window_losses(model: LlamaForCausalLM, tokens: torch.Tensor, length: int) -> list[float]:
    """Mean loss, in nats a token, of each whole window of `length` predictions; windows lie side by side."""
    losses = []
    for start in range(0, len(tokens) - length, length):
        window = tokens[start : start + length + 1]
        logits = model(window[None, :-1]).logits[0].float()
        losses.append(nn.functional.cross_entropy(logits, window[1:]).item())
    return losses


def measure(model: LlamaForCausalLM, tokens: torch.Tensor) -> dict[str, Any]:
    """Size of a model and its perplexity per token on `tokens`, in windows as long as its context."""
    losses = window_losses(model, tokens, model.config.max_position_embeddings)
    return {
        "parameters": model.num_parameters(),
        "heldout_perplexity": math.exp(math.fsum(losses) / len(losses)),
        "heldout_window_losses": losses,
    }


def load_dense(folder: Path) -> tuple[LlamaForCausalLM, Any]:
    """Loads the model, for float32 computation, and its tokenizer."""
    with contextlib.chdir(folder.parent):  # both keep the path that they came from, and are pickled with it
        model = LlamaForCausalLM.from_pretrained(folder.name, dtype=torch.float32).eval()
        return model, AutoTokenizer.from_pretrained(folder.name)


def save_checkpoint(model: LlamaForCausalLM, tokenizer: Any, path: Path) -> LlamaForCausalLM:
    """Saves the pickled model in float16 and returns a float32 model with the weights as they were rounded."""
    svd_llama.register()
    rounded = copy.deepcopy(model)
    rounded.config.dtype = torch.float16
    for parameter in rounded.parameters():  # not `.half()`, which would round the rotary frequencies too
        parameter.data = parameter.data.half()
    torch.save({"model": rounded, "tokenizer": tokenizer}, path)
    return rounded.float()


def calibration_batches(tokens: np.ndarray, count: int, length: int, seed: int) -> list[torch.Tensor]:
    """Draws `count` windows of `length` training tokens, in batches of 16."""
    starts = np.random.default_rng(seed).integers(0, len(tokens) - length, size=count)
    rows = torch.from_numpy(np.stack([tokens[start : start + length] for start in starts]).astype(np.int64))
    return list(rows.split(16))


def main() -> None:
    """Compresses, saves, measures perplexity of both models on the held-out text, and records it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=BUNDLED / "stdlib-llama", help="folder of the dense model")
    parser.add_argument("--data", type=Path, default=WORK, help="token files of train_tokenizer.py")
    parser.add_argument("--out", type=Path, default=BUNDLED, help="folder for the checkpoint and compression.json")
    parser.add_argument("--ratio", type=float, default=0.6, help="share of the projections' parameters that is kept")
    parser.add_argument("--windows", type=int, default=128, help="calibration windows")
    parser.add_argument("--length", type=int, default=512, help="tokens of a calibration window")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    model, tokenizer = load_dense(options.model)
    heldout = torch.from_numpy(np.load(options.data / "heldout.npy").astype(np.int64))
    train = np.load(options.data / "train.npy")
    dense = measure(model, heldout)
    print(f"dense: {dense['parameters']} parameters, perplexity {dense['heldout_perplexity']:.3f}", flush=True)

    ranks = compress(model, calibration_batches(train, options.windows, options.length, options.seed), options.ratio)
    path = options.out / f"stdlib_llama_whitening_only_{options.ratio:g}.pt"
    options.out.mkdir(parents=True, exist_ok=True)
    model = save_checkpoint(model, tokenizer, path)
    small = measure(model, heldout)
    print(
        f"compressed: {small['parameters']} parameters, perplexity {small['heldout_perplexity']:.3f}, {path}",
        flush=True,
    )
    facts = {
        "method": "SVD-LLM v1, whitening only, Gram matrices of the dense model",
        "ratio": options.ratio,
        "dtype": "float16",
        "file": path.name,
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "calibration": {"windows": options.windows, "length": options.length, "seed": options.seed},
        "heldout": {"tokens": len(heldout), "window": model.config.max_position_embeddings},
        "dense": dense,
        "compressed": small,
        "ranks": ranks,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__},
    }
    (options.out / "compression.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
