"""Parameters of a decoder."""

from flashsvd_jax.config import ModelConfig
from flashsvd_jax.param_specs import ParamSpec, Site


def decoder_sites(config: ModelConfig) -> list[Site]:
    """Every projection of a decoder, in the order it is computed."""
    d, ff = config.hidden_size, config.intermediate_size
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    found = []
    for layer in range(config.num_layers):
        attn, mlp = f"layers_{layer}.self_attn", f"layers_{layer}.mlp"
        found += [
            Site(f"{attn}.q_proj", heads, d, "heads", "embed", config.qkv_bias),
            Site(f"{attn}.k_proj", kv_heads, d, "kv_heads", "embed", config.qkv_bias),
            Site(f"{attn}.v_proj", kv_heads, d, "kv_heads", "embed", config.qkv_bias),
            Site(f"{attn}.o_proj", d, heads, "embed", "heads", config.o_bias),
            Site(f"{mlp}.gate_proj", ff, d, "mlp", "embed", config.mlp_bias),
            Site(f"{mlp}.up_proj", ff, d, "mlp", "embed", config.mlp_bias),
            Site(f"{mlp}.down_proj", d, ff, "embed", "mlp", config.mlp_bias),
        ]
    if not config.tie_embeddings:
        found.append(Site("lm_head", config.vocab_size, d, "vocab", "embed", False))
    return found


def decoder_params(config: ModelConfig) -> dict[str, ParamSpec]:
    """Embedding and norms: what belongs to no projection."""
    specs = {"embed_tokens.weight": ParamSpec((config.vocab_size, config.hidden_size), ("vocab", "embed"))}
    norm = ParamSpec((config.hidden_size,), ("embed",))
    for layer in range(config.num_layers):
        specs[f"layers_{layer}.input_layernorm.scale"] = norm
        specs[f"layers_{layer}.post_attention_layernorm.scale"] = norm
        if config.qk_norm:
            for name in ("q_norm", "k_norm"):
                specs[f"layers_{layer}.self_attn.{name}.scale"] = ParamSpec((config.head_dim,), ("head_dim",))
    return specs | {"norm.scale": norm}
