"""The layers that families of compressed models put in place of a linear one, with their published names.

Each is a real PyTorch module whose own forward pass is what the tests compare a converted model with.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
import transformers
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralMLP
from transformers.models.opt.modeling_opt import OPTAttention, OPTDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2MLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3MLP
from transformers.pytorch_utils import Conv1D


class Pair(nn.Module):
    """Two linear layers; subclasses say how they are called."""

    first_name: ClassVar[str]
    second_name: ClassVar[str]

    def __init__(self, d_in: int, rank: int, d_out: int, bias: bool):
        super().__init__()
        setattr(self, self.first_name, nn.Linear(d_in, rank, bias=False))
        setattr(self, self.second_name, nn.Linear(rank, d_out, bias=bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return getattr(self, self.second_name)(getattr(self, self.first_name)(x))

    def set_bias(self, bias: torch.Tensor) -> None:
        getattr(self, self.second_name).bias.copy_(bias)


class ABLinear(Pair):  # ASVD, QSVD, LowRankArena
    first_name, second_name = "BLinear", "ALinear"


class SVDTransformLayer(Pair):  # Dobi-SVD
    first_name, second_name = "ALinear", "BLinear"


class UVLinear(Pair):  # AA-SVD
    first_name, second_name = "V", "U"


class ProjLinear(Pair):  # ZS-SVD, SVD-LLM's Hugging Face export
    first_name, second_name = "v_proj", "u_proj"


class LinLinear(Pair):  # FWSVD
    first_name, second_name = "lin0", "lin1"


class FirstSecond(Pair):  # dynrank
    first_name, second_name = "first", "second"


class SequentialPair(nn.Sequential):  # lillama, GFWSVD
    def __init__(self, d_in: int, rank: int, d_out: int, bias: bool):
        super().__init__(nn.Linear(d_in, rank, bias=False), nn.Linear(rank, d_out, bias=bias))

    def set_bias(self, bias: torch.Tensor) -> None:
        self[1].bias.copy_(bias)


class ModLinear(Pair):  # LEMS
    first_name, second_name = "mod_a", "mod_b"

    def __init__(self, d_in: int, rank: int, d_out: int, bias: bool):
        super().__init__(d_in, rank, d_out, bias=False)
        self.register_parameter("bias", nn.Parameter(torch.zeros(d_out)) if bias else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y if self.bias is None else y + self.bias

    def set_bias(self, bias: torch.Tensor) -> None:
        assert self.bias is not None
        self.bias.copy_(bias)


def compress(model: nn.Module, ranks: Mapping[str, int], layer: type[nn.Module], seed: int = 1) -> None:
    """Replaces linear layers, named by module path, with random pairs; a bias stays as it is."""
    torch.manual_seed(seed)
    for path, rank in ranks.items():
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear | Conv1D)
        d_out, d_in = linear.weight.shape if isinstance(linear, nn.Linear) else linear.weight.shape[::-1]
        pair = layer(d_in, rank, d_out, linear.bias is not None)
        with torch.no_grad():
            for parameter in pair.parameters():
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            if linear.bias is not None:
                pair.set_bias(linear.bias)
        model.set_submodule(path, pair)


def _project(block: nn.Module, stem: str, x: torch.Tensor) -> torch.Tensor:
    dense = block._modules.get(f"{stem}_proj", block._modules.get(stem))
    if dense is not None:
        return dense(x)
    first, second = "uv" if block.__dict__.get("u_first") else "vu"
    y = getattr(block, f"{stem}_{second}_proj")(getattr(block, f"{stem}_{first}_proj")(x))
    bias = getattr(block, f"{stem}_bias", None)
    return y if bias is None else y + bias


class _SVDAttention:
    """SVD-LLM's attention keeps both factors of a projection side by side: q_u_proj and q_v_proj."""

    def q_proj(self, x):
        return _project(self, "q", x)

    def k_proj(self, x):
        return _project(self, "k", x)

    def v_proj(self, x):
        return _project(self, "v", x)

    def o_proj(self, x):
        return _project(self, "o", x)


class _SVDMLP:
    def gate_proj(self, x):
        return _project(self, "gate", x)

    def up_proj(self, x):
        return _project(self, "up", x)

    def down_proj(self, x):
        return _project(self, "down", x)


class SVD_LlamaAttention(_SVDAttention, LlamaAttention): ...


class SVD_LlamaMLP(_SVDMLP, LlamaMLP): ...


class SVD_MistralAttention(_SVDAttention, MistralAttention): ...


class SVD_MistralMLP(_SVDMLP, MistralMLP): ...


class SVD_QwenAttention(_SVDAttention, Qwen2Attention): ...


class SVD_QwenMLP(_SVDMLP, Qwen2MLP): ...


class SVD_Qwen3Attention(_SVDAttention, Qwen3Attention): ...


class SVD_Qwen3MLP(_SVDMLP, Qwen3MLP): ...


class SVDOPTAttention(_SVDAttention, OPTAttention):
    def out_proj(self, x):
        return _project(self, "out", x)


class SVDOPTDecoderLayer(OPTDecoderLayer):
    def fc1(self, x):
        return _project(self, "fc1", x)

    def fc2(self, x):
        return _project(self, "fc2", x)


_BLOCKS = {
    OPTAttention: SVDOPTAttention,
    OPTDecoderLayer: SVDOPTDecoderLayer,
    LlamaAttention: SVD_LlamaAttention,
    LlamaMLP: SVD_LlamaMLP,
    MistralAttention: SVD_MistralAttention,
    MistralMLP: SVD_MistralMLP,
    Qwen2Attention: SVD_QwenAttention,
    Qwen2MLP: SVD_QwenMLP,
    Qwen3Attention: SVD_Qwen3Attention,
    Qwen3MLP: SVD_Qwen3MLP,
}
SVDLLM_MODULES = {
    SVD_LlamaAttention: "component.svd_llama",
    SVD_LlamaMLP: "component.svd_llama",
    SVD_MistralAttention: "component.svd_mistral",
    SVD_MistralMLP: "component.svd_mistral",
    SVD_QwenAttention: "component.svd_qwen",
    SVD_QwenMLP: "component.svd_qwen",
    SVDOPTAttention: "component.svd_opt",
    SVDOPTDecoderLayer: "component.svd_opt",
}


def compress_in_blocks(
    model: transformers.PreTrainedModel, ranks: Mapping[str, int], bias_as_buffer: bool = False, u_first: bool = False
) -> None:
    """SVD-LLM's way: factors become members of the attention and MLP blocks, which change their class.

    Args:
      model: changed in place.
      ranks: rank by module path.
      bias_as_buffer: keep biases as buffers of the block (`q_bias`), as its Qwen classes do, not on the second factor.
      u_first: Swift-SVD's way, whose classes have the same names and apply `q_u_proj` first.
    """
    torch.manual_seed(2)
    for path, rank in ranks.items():
        parent, _, leaf = path.rpartition(".")
        block, stem = model.get_submodule(parent), leaf.removesuffix("_proj")
        linear = block._modules.pop(leaf)
        assert isinstance(linear, nn.Linear)
        has_bias = linear.bias is not None
        v = nn.Linear(linear.in_features, rank, bias=False)
        u = nn.Linear(rank, linear.out_features, bias=has_bias and not bias_as_buffer)
        with torch.no_grad():
            v.weight.normal_(std=linear.in_features**-0.5)
            u.weight.normal_(std=rank**-0.5)
            if has_bias and bias_as_buffer:
                block.register_buffer(f"{stem}_bias", linear.bias.detach().clone())
            elif has_bias:
                u.bias.copy_(linear.bias)
        setattr(block, f"{stem}_u_proj", v if u_first else u)
        setattr(block, f"{stem}_v_proj", u if u_first else v)
        block.__dict__["u_first"] = u_first
        block.__class__ = _BLOCKS.get(type(block), type(block))
