"""Names of the same thing on both sides: a PyTorch state dict and the canonical parameter tree."""

import re

_LAYER = re.compile(r"^layers_(\d+)\.")

# Tensors that some exports store beside the weights and that can be computed again: rotary caches and masks.
_BUFFERS = re.compile(
    r"(?:^|\.)(?:rotary_emb\.\w+|(?:original_)?inv_freq|(?:cos|sin)_cached|masked_bias|(?:self_)?attn\.bias)$"
)


def torch_name(name: str) -> str:
    """A site, or a parameter of a dense model, as transformers names it: `layers_0.mlp` -> `model.layers.0.mlp`."""
    name = re.sub(r"\.scale$", ".weight", name)
    return name if name.startswith("lm_head") else "model." + _LAYER.sub(r"layers.\1.", name)


def is_buffer(name: str) -> bool:
    """Whether a tensor is a cache or a mask, which a converter drops."""
    return _BUFFERS.search(name) is not None
