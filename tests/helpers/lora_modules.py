"""Layers that PEFT puts around those it trains, and adapters saved as it saves them."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn


class LoraLayer(nn.Module):
    """Around a linear layer, a pair of them, or an embedding: its output, plus ``scaling * B(A(x))``."""

    def __init__(self, base_layer: nn.Module, d_in: int, d_out: int, rank: int, scaling: float):
        super().__init__()
        self.base_layer, self.scaling = base_layer, scaling
        if isinstance(base_layer, nn.Embedding):
            self.lora_embedding_A = nn.ParameterDict({"default": torch.randn(rank, d_in)})
            self.lora_embedding_B = nn.ParameterDict({"default": torch.randn(d_out, rank) * rank**-0.5})
        else:
            self.lora_A = nn.ModuleDict({"default": nn.Linear(d_in, rank, bias=False)})
            self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, d_out, bias=False)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.base_layer, nn.Embedding):
            a, b = self.lora_embedding_A["default"], self.lora_embedding_B["default"]
            return self.base_layer(x) + self.scaling * nn.functional.embedding(x, a.T) @ b.T
        return self.base_layer(x) + self.scaling * self.lora_B["default"](self.lora_A["default"](x))


def add_lora(
    model: nn.Module, folder: Path, ranks: Mapping[str, int], alphas: Mapping[str, float], **settings: Any
) -> dict[str, Any]:
    """Wraps modules by path, and saves the adapter; modules in ``modules_to_save`` get new values and are saved whole.

    Returns:
      The adapter's configuration: rank and scale of the first module are those of all, others have patterns of their own.
    """
    first, modules = next(iter(ranks)), settings.get("modules_to_save") or []
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "somebody/tiny",
        "target_modules": sorted({path.rpartition(".")[2] for path in ranks}),
        "r": ranks[first],
        "lora_alpha": alphas[first],
        "rank_pattern": {path: rank for path, rank in ranks.items() if rank != ranks[first]},
        "alpha_pattern": {path: alpha for path, alpha in alphas.items() if alpha != alphas[first]},
        "init_lora_weights": True,
        "use_rslora": False,
        "fan_in_fan_out": False,
        **settings,
    }
    for path, rank in ranks.items():
        d_in, d_out = _sizes(model.get_submodule(path))
        scale = alphas[path] / (math.sqrt(rank) if config["use_rslora"] else rank)
        model.set_submodule(path, LoraLayer(model.get_submodule(path), d_in, d_out, rank, scale))
    for path in modules:
        for parameter in model.get_submodule(path).parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    folder.mkdir(parents=True, exist_ok=True)
    saved = {
        f"base_model.model.{name.replace('.default', '')}": tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if ".lora_" in name or name.rpartition(".")[0] in modules
    }
    save_file(saved, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return config


def _sizes(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    sizes = [(layer.in_features, layer.out_features) for layer in layers]
    # Of a pair, whichever layer comes first: the rank is the smaller side of both.
    return max(d_in for d_in, _ in sizes), max(d_out for _, d_out in sizes)
