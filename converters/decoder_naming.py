"""Names of those decoders' parameters in transformers that are called otherwise than Llama's."""

import re

from converters.naming import Naming

# What names begin with, and canonical names without the last part, of a layer without its number, -> module paths behind that.
OPT = (
    "model.decoder.",
    {
        "embed_tokens": "embed_tokens",
        "embed_positions": "embed_positions",
        "layers": "layers",
        "input_layernorm": "self_attn_layer_norm",
        "self_attn.q_proj": "self_attn.q_proj",
        "self_attn.k_proj": "self_attn.k_proj",
        "self_attn.v_proj": "self_attn.v_proj",
        "self_attn.o_proj": "self_attn.out_proj",
        "post_attention_layernorm": "final_layer_norm",
        "mlp.up_proj": "fc1",
        "mlp.down_proj": "fc2",
        "norm": "final_layer_norm",
        "lm_head": "lm_head",
    },
)
GPT2 = (
    "transformer.",
    {
        "embed_tokens": "wte",
        "embed_positions": "wpe",
        "layers": "h",
        "input_layernorm": "ln_1",
        "self_attn.qkv_proj": "attn.c_attn",
        "self_attn.o_proj": "attn.c_proj",
        "post_attention_layernorm": "ln_2",
        "mlp.up_proj": "mlp.c_fc",
        "mlp.down_proj": "mlp.c_proj",
        "norm": "ln_f",
        "lm_head": "lm_head",
    },
)

_TEXT_MODEL = re.compile(r"^(?:language_model\.(?=model\.|lm_head\.)|model\.language_model\.)")
_OTHER_MODELS = re.compile(r"^(?:model\.)?(?:vision_tower|multi_modal_projector)\.")


class MultimodalNaming(Naming):
    """As Llama's, of a text model that may come inside a model that also sees; that one's other parts are not needed."""

    def bare(self, name: str) -> str:
        found = _TEXT_MODEL.match(name)
        if found is None:
            return name
        return name[found.end() :] if found[0] == "language_model." else f"model.{name[found.end() :]}"

    def is_unused(self, name: str) -> bool:
        return _OTHER_MODELS.match(name) is not None
