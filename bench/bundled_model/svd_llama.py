"""Factorized Llama modules under the class paths that published SVD-LLM checkpoints pickle.

Such a checkpoint is a whole pickled model whose attention and MLP modules are `SVD_LlamaAttention` and `SVD_LlamaMLP`
of a module `component.svd_llama`. The classes here keep those paths and attribute names and work inside transformers 5;
`register()` makes the module importable, which pickling and unpickling need.
"""

import sys
import types
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

MODULE_NAME = "component.svd_llama"


class LlamaRotaryEmbedding(nn.Module):
    """Rotary angles without scaling; keeps `inv_freq` in the checkpoint, as the published class does."""

    __module__ = MODULE_NAME

    def __init__(self, head_dim: int, base: float):
        super().__init__()
        self.register_buffer("inv_freq", base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine [batch, 1, tokens, head_dim] of the positions [batch, tokens]."""
        angles = positions[:, None, :, None].float() * self.get_buffer("inv_freq").float()
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


class SVD_LlamaAttention(nn.Module):
    """Attention whose four projections are `u(v(x))`; `*_v_proj` is the factor that meets the input."""

    __module__ = MODULE_NAME

    def __init__(self, config: Any, ranks: dict[str, int], layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.hidden_size, self.head_dim = config.hidden_size, config.head_dim
        self.num_heads, self.num_key_value_heads = config.num_attention_heads, config.num_key_value_heads
        hidden, q_size = self.hidden_size, self.num_heads * self.head_dim
        kv_size = self.num_key_value_heads * self.head_dim
        self.q_u_proj, self.q_v_proj = _factors(q_size, hidden, ranks["q"])
        self.k_u_proj, self.k_v_proj = _factors(kv_size, hidden, ranks["k"])
        self.v_u_proj, self.v_v_proj = _factors(kv_size, hidden, ranks["v"])
        self.o_u_proj, self.o_v_proj = _factors(hidden, q_size, ranks["o"])
        self.rotary_emb = LlamaRotaryEmbedding(self.head_dim, config.rope_parameters["rope_theta"])

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attends as transformers' eager Llama attention does; `attention_mask` is the additive causal mask.

        The keys and values so far are `cache` since transformers 5.24, `past_key_values` before.
        """
        batch, tokens, _hidden = hidden_states.shape
        pairs = ((self.q_u_proj, self.q_v_proj), (self.k_u_proj, self.k_v_proj), (self.v_u_proj, self.v_v_proj))
        q, k, v = (up(down(hidden_states)).view(batch, tokens, -1, self.head_dim).transpose(1, 2) for up, down in pairs)
        cos, sin = self.rotary_emb(position_ids)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        cache = past_key_values if cache is None else cache
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        group = self.num_heads // self.num_key_value_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        scores = q @ k.transpose(2, 3) * self.head_dim**-0.5
        if attention_mask is not None:
            scores = scores + attention_mask[..., : k.shape[2]]
        weights = scores.float().softmax(dim=-1).to(q.dtype)
        attended = (weights @ v).transpose(1, 2).reshape(batch, tokens, -1)
        return self.o_u_proj(self.o_v_proj(attended)), None


class SVD_LlamaMLP(nn.Module):
    """Gated MLP whose three projections are `u(v(x))`."""

    __module__ = MODULE_NAME

    def __init__(self, config: Any, ranks: dict[str, int]):
        super().__init__()
        hidden, intermediate = config.hidden_size, config.intermediate_size
        self.gate_u_proj, self.gate_v_proj = _factors(intermediate, hidden, ranks["gate"])
        self.up_u_proj, self.up_v_proj = _factors(intermediate, hidden, ranks["up"])
        self.down_u_proj, self.down_v_proj = _factors(hidden, intermediate, ranks["down"])
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns down(silu(gate(x)) * up(x))."""
        gate, up = self.gate_u_proj(self.gate_v_proj(x)), self.up_u_proj(self.up_v_proj(x))
        return self.down_u_proj(self.down_v_proj(self.act_fn(gate) * up))


def register() -> None:
    """Makes `component.svd_llama` importable, with the classes of this file in it."""
    module = types.ModuleType(MODULE_NAME)
    for cls in (LlamaRotaryEmbedding, SVD_LlamaAttention, SVD_LlamaMLP):
        setattr(module, cls.__name__, cls)
    package = types.ModuleType(MODULE_NAME.partition(".")[0])
    package.__path__ = []
    sys.modules.update({package.__name__: package, MODULE_NAME: module})


def _factors(d_out: int, d_in: int, rank: int) -> tuple[nn.Linear, nn.Linear]:
    """The linear maps u [d_out, rank] and v [rank, d_in], freshly initialized."""
    return nn.Linear(rank, d_out, bias=False), nn.Linear(d_in, rank, bias=False)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-second, first), dim=-1) * sin.to(x.dtype)
