"""Parameters of a decoder."""

from flashsvd_jax.config import ModelConfig
from flashsvd_jax.param_specs import ParamSpec, Site


def decoder_sites(config: ModelConfig) -> list[Site]:
    """Every projection of a decoder, in the order it is computed."""
    found = []
    for layer in range(config.num_layers):
        found += [*_attention_sites(config, f"layers_{layer}.self_attn"), *_mlp_sites(config, f"layers_{layer}.mlp")]
    if not config.tie_embeddings:
        found.append(Site("lm_head", config.vocab_size, config.hidden_size, "vocab", "embed", False))
    return found


def decoder_params(config: ModelConfig) -> dict[str, ParamSpec]:
    """Embeddings and norms: what belongs to no projection."""
    d = config.hidden_size
    specs = {"embed_tokens.weight": ParamSpec((config.vocab_size, d), ("vocab", "embed"))}
    if config.learned_positions:
        rows = config.first_position + config.max_position
        specs["embed_positions.weight"] = ParamSpec((rows, d), ("positions", "embed"))
    for layer in range(config.num_layers):
        for name in block_norms(config):
            specs |= _norm(config, f"layers_{layer}.{name}", d, "embed")
        if config.qk_norm:
            for name in ("q_norm", "k_norm"):
                specs |= _norm(config, f"layers_{layer}.self_attn.{name}", config.head_dim, "head_dim")
    return specs | _norm(config, "norm", d, "embed")


def block_norms(config: ModelConfig) -> tuple[str, ...]:
    """Names of a layer's norms in the order they are computed: those before attention and MLP, and Gemma's behind each of them."""
    if config.output_norms:
        return "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
    return "input_layernorm", "post_attention_layernorm"


def qkv_widths(config: ModelConfig) -> tuple[int, int, int]:
    """Outputs for queries, keys and values."""
    kv = config.num_kv_heads * config.head_dim
    return config.num_heads * config.head_dim, kv, kv


def first_projections(config: ModelConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the projections before attention, and of those before the activation."""
    qkv = ("qkv_proj",) if config.fused else ("q_proj", "k_proj", "v_proj")
    if not config.gated:
        return qkv, ("up_proj",)
    return qkv, ("gate_up_proj",) if config.fused else ("gate_proj", "up_proj")


def _attention_sites(config: ModelConfig, block: str) -> list[Site]:
    d, widths = config.hidden_size, qkv_widths(config)
    axes, names = ("heads", "kv_heads", "kv_heads"), first_projections(config)[0]
    inputs = [
        Site(f"{block}.{name}", sum(widths) if config.fused else width, d, axis, "embed", config.qkv_bias)
        for name, width, axis in zip(names, widths, axes, strict=False)
    ]
    return [*inputs, Site(f"{block}.o_proj", d, widths[0], "embed", "heads", config.o_bias)]


def _mlp_sites(config: ModelConfig, block: str) -> list[Site]:
    d, ff, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
    names = first_projections(config)[1]
    rows = 2 * ff if names == ("gate_up_proj",) else ff
    inner = [Site(f"{block}.{name}", rows, d, "mlp", "embed", bias) for name in names]
    return [*inner, Site(f"{block}.down_proj", d, ff, "embed", "mlp", bias)]


def _norm(config: ModelConfig, name: str, width: int, axis: str) -> dict[str, ParamSpec]:
    parts = ("scale", "bias") if config.layer_norm else ("scale",)
    return {f"{name}.{part}": ParamSpec((width,), (axis,)) for part in parts}
