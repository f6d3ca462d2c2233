"""What goes into a PyTorch model's modules."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import nn


def module_inputs(model: nn.Module, modules: Mapping[str, nn.Module], tokens: np.ndarray) -> dict[str, np.ndarray]:
    """The inputs [tokens, d_in] of modules of a model, by their names there, as float64."""
    found: dict[str, np.ndarray] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        return lambda _module, given: found.__setitem__(name, given[0].flatten(0, -2).double().numpy())

    hooks = [module.register_forward_pre_hook(keep(name)) for name, module in modules.items()]
    with torch.no_grad():
        model(torch.tensor(tokens).long())
    for hook in hooks:
        hook.remove()
    return found


def decoder_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The projections of a decoder's layers by site."""
    named = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return {n.removeprefix("model.").replace("layers.", "layers_", 1): m for n, m in named if ".layers." in n}
