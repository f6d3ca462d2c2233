"""Names of encoders' parameters in transformers, and the naming of any model."""

import re
from dataclasses import dataclass, field

from converters.decoder_naming import GPT2, OPT, MultimodalNaming
from converters.naming import Naming
from flashsvd_jax.any_config import AnyConfig
from flashsvd_jax.config import ModelConfig
from flashsvd_jax.encoder_config import EncoderConfig

# Canonical names without the last part, and of a layer without its number, -> module paths without the body's prefix.
_BERT = {
    "embed_tokens": "embeddings.word_embeddings",
    "embed_positions": "embeddings.position_embeddings",
    "embed_types": "embeddings.token_type_embeddings",
    "embed_norm": "embeddings.LayerNorm",
    "layers": "encoder.layer",
    "self_attn.q_proj": "attention.self.query",
    "self_attn.k_proj": "attention.self.key",
    "self_attn.v_proj": "attention.self.value",
    "self_attn.o_proj": "attention.output.dense",
    "self_attn_norm": "attention.output.LayerNorm",
    "mlp.up_proj": "intermediate.dense",
    "mlp.down_proj": "output.dense",
    "mlp_norm": "output.LayerNorm",
    "norm": "norm",  # in FlashSVD's class alone
}
_DISTILBERT = {
    "embed_tokens": "embeddings.word_embeddings",
    "embed_positions": "embeddings.position_embeddings",
    "embed_norm": "embeddings.LayerNorm",
    "layers": "transformer.layer",
    "self_attn.q_proj": "attention.q_lin",
    "self_attn.k_proj": "attention.k_lin",
    "self_attn.v_proj": "attention.v_lin",
    "self_attn.o_proj": "attention.out_lin",
    "self_attn_norm": "sa_layer_norm",
    "mlp.up_proj": "ffn.lin1",
    "mlp.down_proj": "ffn.lin2",
    "mlp_norm": "output_layer_norm",
}
_MODERNBERT = {
    "embed_tokens": "embeddings.tok_embeddings",
    "embed_norm": "embeddings.norm",
    "layers": "layers",
    "self_attn_norm": "attn_norm",
    "self_attn.qkv_proj": "attn.Wqkv",
    "self_attn.o_proj": "attn.Wo",
    "mlp_norm": "mlp_norm",
    "mlp.gate_up_proj": "mlp.Wi",
    "mlp.down_proj": "mlp.Wo",
    "norm": "final_norm",
}
_BERT_HEADS = {
    "masked_lm": {
        "head.dense": "cls.predictions.transform.dense",
        "head.norm": "cls.predictions.transform.LayerNorm",
        "head.out": "cls.predictions.decoder",
    },
    "classification": {"head.dense": "pooler.dense", "head.out": "classifier"},
}
_ROBERTA_HEADS = {
    "masked_lm": {"head.dense": "lm_head.dense", "head.norm": "lm_head.layer_norm", "head.out": "lm_head.decoder"},
    "classification": {"head.dense": "classifier.dense", "head.out": "classifier.out_proj"},
}
_DISTILBERT_HEADS = {
    "masked_lm": {"head.dense": "vocab_transform", "head.norm": "vocab_layer_norm", "head.out": "vocab_projector"},
    "classification": {"head.dense": "pre_classifier", "head.out": "classifier"},
}
_MODERNBERT_HEADS = {
    "masked_lm": {"head.dense": "head.dense", "head.norm": "head.norm", "head.out": "decoder"},
    "classification": {"head.dense": "head.dense", "head.norm": "head.norm", "head.out": "classifier"},
}
_FAMILIES = {
    "bert": ("bert.", _BERT, _BERT_HEADS),
    "roberta": ("roberta.", _BERT, _ROBERTA_HEADS),
    "xlm-roberta": ("roberta.", _BERT, _ROBERTA_HEADS),
    "camembert": ("roberta.", _BERT, _ROBERTA_HEADS),
    "distilbert": ("distilbert.", _DISTILBERT, _DISTILBERT_HEADS),
    "modernbert": ("model.", _MODERNBERT, _MODERNBERT_HEADS),
}

_LAYER = re.compile(r"^layers_(\d+)\.")
_OF_HEADS = re.compile(r"^(?:cls|lm_head|head|decoder|classifier|pre_classifier|qa_outputs|vocab_\w+)\.")
_OF_PRETRAINING = re.compile(r"^(?:pooler|cls\.seq_relationship)\.")


@dataclass(frozen=True)
class TableNaming(Naming):
    """How transformers names the parameters of an encoder, or of a decoder that has names of its own; their form here is that of
    the model without a head.

    Attributes:
      prefix: stands before the names of the body where there is a head; checkpoints have it, the end of it, or nothing.
      modules: module paths by canonical name.
      spare_bias: a second name of the output layer's bias. With tied embeddings both are one tensor; without, if both are
        stored, this one is not computed with.
    """

    prefix: str = ""
    modules: dict[str, str] = field(default_factory=dict)
    spare_bias: str = ""

    def module(self, site: str) -> str:
        number = _LAYER.match(site)
        if number is None:
            return self.modules[site]
        return f"{self.modules['layers']}.{number[1]}.{self.modules[site[number.end() :]]}"

    def biases(self, site: str, second: str | None = None) -> tuple[str, ...]:
        spare = [self.spare_bias] if self.spare_bias and site == "head.out" else []
        return (*super().biases(site, second), *spare)

    def parameter(self, name: str) -> tuple[str, ...]:
        owner, _, part = name.rpartition(".")
        if owner == "head.out":
            return self.biases(owner)
        module = self.module(owner)
        today = f"{module}.{'weight' if part == 'scale' else part}"
        # Checkpoints from before 2019 have TensorFlow's names for what a norm multiplies with and adds.
        old = [f"{module}.{'gamma' if part == 'scale' else 'beta'}"] if owner.endswith("norm") else []
        # Of tensors that are one, some savers keep whichever comes first.
        return (today, *old, *(twin for twin, kept in self.twins if kept == today))

    def bare(self, name: str) -> str:
        _, _, end = self.prefix.partition(".")
        short = name.removeprefix(self.prefix)
        return short.removeprefix(end) if short == name else short

    def whole(self, name: str) -> str:
        return self.prefix + name if self.head and not _OF_HEADS.match(name) else name

    def claimed(self, name: str) -> str:
        return self.bare(name)

    def is_unused(self, name: str) -> bool:
        """What stands on the body, where only the body is meant, and in any case what pretraining alone needs."""
        of_others = _OF_PRETRAINING.match(name) or (not self.head and _OF_HEADS.match(name))
        return bool(of_others) or name == self.spare_bias


def naming_of(config: AnyConfig) -> Naming:
    """How transformers names the parameters of a model."""
    if not isinstance(config, EncoderConfig):
        return _decoder_naming(config)
    prefix, body, heads = _FAMILIES[config.model_type]
    if config.head is None:
        return TableNaming("", (), False, prefix, body)
    head = heads[config.head.kind]
    out = head["head.out"]
    spare = f"{out.removesuffix('.decoder')}.bias" if out.endswith(".decoder") else ""
    twins = []
    if config.head.tied:
        twins.append((f"{out}.weight", f"{body['embed_tokens']}.weight"))
    if config.head.tied and spare:
        twins.append((spare, f"{out}.bias"))
    return TableNaming(out, tuple(twins), False, prefix, body | head, spare)


def _decoder_naming(config: ModelConfig) -> Naming:
    own = {"opt": OPT, "gpt2": GPT2}.get(config.model_type)
    if own is None:
        kind = MultimodalNaming if config.model_type == "gemma3_text" else Naming
        return kind(twins=(("lm_head.weight", "model.embed_tokens.weight"),) if config.tie_embeddings else ())
    prefix, modules = own
    twins = (("lm_head.weight", f"{modules['embed_tokens']}.weight"),) if config.tie_embeddings else ()
    return TableNaming("lm_head", twins, config.model_type == "gpt2", prefix, modules)
