"""A Llama decoder in PyTorch with a static cache of keys and values, dense or low rank, for one batch size.

It computes what `flashsvd_jax.models.decoder` computes, from arrays of the same names, in the way PyTorch users run it:
`torch.nn.functional.linear` for each matrix and SDPA for attention.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashsvd_jax.config import ModelConfig, RopeConfig
from flashsvd_jax.errors import RequestError

Get = Callable[[str], Tensor]


class Linear(nn.Module):
    """A dense weight [d_out, d_in], or two factors: ``down`` [rank, d_in] and ``up`` [d_out, rank]."""

    def __init__(self, get: Get, site: str, is_low_rank: bool):
        super().__init__()
        self.first = _frozen(get(f"{site}.down" if is_low_rank else f"{site}.weight"))
        self.up = _frozen(get(f"{site}.up")) if is_low_rank else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.first)
        return y if self.up is None else F.linear(y, self.up)


class Separate(nn.Module):
    """Projections of one input, each computed for itself."""

    def __init__(self, parts: list[Linear]):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [part(x) for part in self.parts]


class Packed(nn.Module):
    """Projections of one input whose first matrices (``down`` factors, or dense weights) are one product."""

    def __init__(self, parts: list[Linear]):
        super().__init__()
        self.sizes = [part.first.shape[0] for part in parts]
        self.first = _frozen(torch.cat([part.first for part in parts]))
        ups = [part.up for part in parts]
        self.ups = nn.ParameterList([up for up in ups if up is not None])
        # Of each part its factor among ``ups``, None if it is dense.
        self.places = [None if up is None else sum(u is not None for u in ups[:i]) for i, up in enumerate(ups)]

    def forward(self, x: Tensor) -> list[Tensor]:
        firsts = F.linear(x, self.first).split(self.sizes, -1)
        return [
            y if place is None else F.linear(y, self.ups[place]) for y, place in zip(firsts, self.places, strict=True)
        ]


class Layer(nn.Module):
    """One block and its part of the cache: keys and values [batch, kv_heads, slots, head_dim]."""

    def __init__(self, config: ModelConfig, get: Get, index: int, batch: int, slots: int, is_packed: bool):
        super().__init__()
        name, ranks = f"layers_{index}", config.factorization.rank_by_site
        linear = lambda site: Linear(get, f"{name}.{site}", f"{name}.{site}" in ranks)  # noqa: E731
        group = Packed if is_packed else Separate
        self.head_dim, self.eps = config.head_dim, config.norm_eps
        self.has_groups = config.num_heads != config.num_kv_heads
        self.qkv = group([linear(f"self_attn.{which}_proj") for which in "qkv"])
        self.o, self.down = linear("self_attn.o_proj"), linear("mlp.down_proj")
        self.gate_up = group([linear("mlp.gate_proj"), linear("mlp.up_proj")])
        self.input_norm = _frozen(get(f"{name}.input_layernorm.scale"))
        self.post_attention_norm = _frozen(get(f"{name}.post_attention_layernorm.scale"))
        empty = self.input_norm.new_zeros(batch, config.num_kv_heads, slots, config.head_dim)
        self.keys: Tensor = nn.Buffer(empty)
        self.values: Tensor = nn.Buffer(empty.clone())

    def forward(self, x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        """Hidden states [batch, tokens, embed]; a mask [1, 1, tokens, slots] to attend over the cache, None for a prompt."""
        batch, tokens, _ = x.shape
        h = rms_norm(x, self.input_norm, self.eps)
        q, k, v = (y.view(batch, tokens, -1, self.head_dim).transpose(1, 2) for y in self.qkv(h))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        self.keys.index_copy_(2, positions, k)
        self.values.index_copy_(2, positions, v)
        if mask is None:
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.has_groups)
        else:
            a = F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=mask, enable_gqa=self.has_groups)
        x = x + self.o(a.transpose(1, 2).reshape(batch, tokens, -1))
        gate, up = self.gate_up(rms_norm(x, self.post_attention_norm, self.eps))
        return x + self.down(F.silu(gate) * up)


class PeerModel(nn.Module):
    """The whole decoder.

    Args:
      config: a Llama without biases, scaled rotary frequencies or sliding windows.
      get: flat name of `flashsvd_jax.schema` -> tensor on the device.
      batch: sequences at once.
      slots: positions that the cache holds.
      is_packed: first matrices of q, k and v, and of gate and up, as one product each.

    Raises:
      RequestError: a model that this decoder does not compute.
    """

    def __init__(self, config: ModelConfig, get: Get, batch: int, slots: int, is_packed: bool = False):
        super().__init__()
        rope = config.rope or RopeConfig()
        plain = ModelConfig(
            config.model_type, config.vocab_size, config.hidden_size, config.intermediate_size, config.num_layers,
            config.num_heads, config.num_kv_heads, config.head_dim, config.max_position, config.norm_eps,
            RopeConfig(theta=rope.theta), (None,) * config.num_layers, bos_token_id=config.bos_token_id,
            eos_token_ids=config.eos_token_ids, factorization=config.factorization,
        )  # fmt: skip
        if config != plain:
            raise RequestError(f"the PyTorch decoder has no {config.model_type} with these options; plain Llama only")
        self.batch, self.slots, self.eps = batch, slots, config.norm_eps
        self.embedding, self.norm = _frozen(get("embed_tokens.weight")), _frozen(get("norm.scale"))
        self.head = Linear(get, "lm_head", "lm_head" in config.factorization.rank_by_site)
        self.layers = nn.ModuleList(
            Layer(config, get, index, batch, slots, is_packed) for index in range(config.num_layers)
        )
        device = self.embedding.device
        exponents = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
        angles = torch.outer(torch.arange(slots, device=device).float(), rope.theta**-exponents)
        self.cos: Tensor = nn.Buffer(angles.cos().to(self.embedding.dtype))
        self.sin: Tensor = nn.Buffer(angles.sin().to(self.embedding.dtype))

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(cos, sin, mask) of a decode step at positions [tokens]; the mask hides slots that are not filled."""
        mask = torch.arange(self.slots, device=positions.device)[None] <= positions[:, None]
        return self.cos[positions], self.sin[positions], mask[None, None]

    def logits(self, x: Tensor) -> Tensor:
        """[batch, vocab] of the last of hidden states [batch, tokens, embed]."""
        return self.head(rms_norm(x[:, -1], self.norm, self.eps))

    def prefill(self, tokens: Tensor) -> Tensor:
        """Logits [batch, vocab] after prompts [batch, tokens], which are written to the cache from slot 0 on."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x, cos, sin = F.embedding(tokens, self.embedding), self.cos[positions], self.sin[positions]
        for layer in self.layers:
            x = layer(x, positions, cos, sin, None)
        return self.logits(x)

    def decode(self, token: Tensor, position: Tensor) -> Tensor:
        """Logits [batch, vocab] after one more token [batch, 1] at position [1]."""
        x, tables = F.embedding(token, self.embedding), self.tables(position)
        for layer in self.layers:
            x = layer(x, position, *tables)
        return self.logits(x)


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis, statistics in float32."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * scale


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of heads [batch, heads, tokens, head_dim] by tables [tokens, head_dim // 2]."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
