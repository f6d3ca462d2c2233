"""Parameters of an encoder."""

from flashsvd_jax.encoder_config import EncoderConfig
from flashsvd_jax.param_specs import ParamSpec, Site


def encoder_sites(config: EncoderConfig) -> list[Site]:
    """Every projection of an encoder and its head, in the order it is computed."""
    d = config.hidden_size
    found = []
    for layer in range(config.num_layers):
        found += [*_attention_sites(config, f"layers_{layer}.self_attn"), *_mlp_sites(config, f"layers_{layer}.mlp")]
    if config.head is not None:
        found.append(Site("head.dense", d, d, "embed", "embed", config.head.dense_bias))
        if not config.head.tied:
            found.append(Site("head.out", config.head.outputs, d, _out_axis(config), "embed", config.head.out_bias))
    return found


def encoder_params(config: EncoderConfig) -> dict[str, ParamSpec]:
    """Embeddings and norms: what belongs to no projection."""
    d = config.hidden_size
    specs = {"embed_tokens.weight": ParamSpec((config.vocab_size, d), ("vocab", "embed"))}
    if config.learned_positions:
        rows = config.first_position + config.max_position
        specs["embed_positions.weight"] = ParamSpec((rows, d), ("positions", "embed"))
    if config.num_types:
        specs["embed_types.weight"] = ParamSpec((config.num_types, d), ("types", "embed"))
    specs |= _norm(config, "embed_norm")
    for layer in range(config.num_layers):
        if has_attention_norm(config, layer):
            specs |= _norm(config, f"layers_{layer}.self_attn_norm")
        specs |= _norm(config, f"layers_{layer}.mlp_norm")
    if config.final_norm:
        specs |= _norm(config, "norm")
    if config.head is not None and config.head.has_norm:
        specs |= _norm(config, "head.norm")
    if config.head is not None and config.head.tied and config.head.out_bias:
        specs["head.out.bias"] = ParamSpec((config.head.outputs,), (_out_axis(config),))
    return specs


def has_attention_norm(config: EncoderConfig, layer: int) -> bool:
    """Whether a layer norms beside its attention: before the first one, the embedding's norm has just done it."""
    return layer > 0 or not config.pre_norm


def _attention_sites(config: EncoderConfig, block: str) -> list[Site]:
    d, bias = config.hidden_size, config.attention_bias
    if config.fused:
        inputs = [Site(f"{block}.qkv_proj", 3 * d, d, "heads", "embed", bias)]
    else:
        inputs = [Site(f"{block}.{name}_proj", d, d, "heads", "embed", bias) for name in "qkv"]
    return [*inputs, Site(f"{block}.o_proj", d, d, "embed", "heads", bias)]


def _mlp_sites(config: EncoderConfig, block: str) -> list[Site]:
    d, ff, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
    if config.gated:
        inner = Site(f"{block}.gate_up_proj", 2 * ff, d, "mlp", "embed", bias)
    else:
        inner = Site(f"{block}.up_proj", ff, d, "mlp", "embed", bias)
    return [inner, Site(f"{block}.down_proj", d, ff, "embed", "mlp", bias)]


def _norm(config: EncoderConfig, name: str) -> dict[str, ParamSpec]:
    spec = ParamSpec((config.hidden_size,), ("embed",))
    return {f"{name}.{part}": spec for part in (("scale", "bias") if config.norm_bias else ("scale",))}


def _out_axis(config: EncoderConfig) -> str:
    return "vocab" if config.head is not None and config.head.kind == "masked_lm" else "labels"
