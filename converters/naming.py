"""Names of the same thing on both sides: a PyTorch state dict and the canonical parameter tree."""

import re
from dataclasses import dataclass

from converters.rules import bias_names

_LAYER = re.compile(r"^layers_(\d+)\.")

# Tensors that some exports store beside the weights and that can be computed again: rotary caches and masks.
_BUFFERS = re.compile(
    r"(?:^|\.)(?:rotary_emb\.\w+|(?:original_)?inv_freq|(?:cos|sin)_cached|masked_bias|(?:self_)?attn\.bias"
    r"|embeddings\.(?:position|token_type)_ids)$"
)


@dataclass(frozen=True)
class Naming:
    """How transformers names a model's parameters: those of a decoder, and what other models do otherwise.

    Attributes:
      head: module path of the output layer; empty where there is none.
      twins: pairs of tensors that hold the same values where both are stored; the first of each is not needed.
      transposed: transformers' class holds the weights of the layers as [d_in, d_out].
    """

    head: str = "lm_head"
    twins: tuple[tuple[str, str], ...] = ()
    transposed: bool = False

    def module(self, site: str) -> str:
        """Module path of a projection: `layers_0.mlp.up_proj` -> `model.layers.0.mlp.up_proj`."""
        return torch_name(site)

    def biases(self, site: str, second: str | None = None) -> tuple[str, ...]:
        """The names that a projection's bias may have; ``second`` is its second factor, if it has any."""
        return bias_names(self.module(site), second)

    def parameter(self, name: str) -> tuple[str, ...]:
        """The names that a parameter of no projection may have; the first is today's."""
        return (torch_name(name),)

    def bare(self, name: str) -> str:
        """A tensor's name in the form that the other methods give, from the one it is stored under."""
        return name

    def whole(self, name: str) -> str:
        """The name that transformers' class has for a tensor, from the one in the form of the other methods."""
        return name

    def claimed(self, name: str) -> str:
        """A module's path as `module` gives it, from the name that a map of ranks has for it."""
        short = self.bare(name)
        return short if short.startswith(("model.", "lm_head")) else f"model.{short}"

    def is_unused(self, name: str) -> bool:
        """Whether the model does not compute with a tensor."""
        return False


def torch_name(name: str) -> str:
    """A decoder's site or parameter as transformers names it: `layers_0.mlp` -> `model.layers.0.mlp`."""
    name = re.sub(r"\.scale$", ".weight", name)
    return name if name.startswith("lm_head") else "model." + _LAYER.sub(r"layers.\1.", name)


def is_buffer(name: str) -> bool:
    """Whether a tensor is a cache or a mask, which a converter drops."""
    return _BUFFERS.search(name) is not None
