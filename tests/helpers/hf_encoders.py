"""Tiny random encoders of transformers, dense or factorized, and the same values as a canonical parameter tree.

Every array axis of a model has a length of its own, so that a swapped axis is an error and not a coincidence.
"""

from typing import Any

import transformers
from hf_models import randomize

_COMMON = {"pad_token_id": 0, "attn_implementation": "eager"}
_BERT = {
    "hidden_size": 40, "num_attention_heads": 5, "intermediate_size": 54, "vocab_size": 71, "num_hidden_layers": 2,
    "max_position_embeddings": 37, "type_vocab_size": 3, "layer_norm_eps": 1e-2,
}  # fmt: skip

_ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", _BERT),
    "bert_tanh": ("Bert", {**_BERT, "hidden_act": "gelu_new", "tie_word_embeddings": False, "num_labels": 4}),
    "roberta": ("Roberta", {**_BERT, "pad_token_id": 3, "type_vocab_size": 1, "hidden_act": "relu", "num_labels": 3}),
    "xlm_roberta": ("XLMRoberta", {**_BERT, "pad_token_id": 1, "num_hidden_layers": 1}),
    "distilbert": (
        "DistilBert",
        {"dim": 36, "n_heads": 4, "hidden_dim": 46, "vocab_size": 67, "n_layers": 2, "max_position_embeddings": 35},
    ),
}

ARCHITECTURES = tuple(_ARCHITECTURES)
HEADS = ("Model", "ForMaskedLM", "ForSequenceClassification")


def build_encoder(architecture: str, head: str = "Model", seed: int = 0, **overrides: Any) -> Any:
    """A float32 model in evaluation mode whose every parameter is random; overrides are fields of its config."""
    family, fields = _ARCHITECTURES[architecture]
    config = getattr(transformers, f"{family}Config")(**{**_COMMON, **fields, **overrides})
    config.architectures = [f"{family}{head}"]
    model = getattr(transformers, f"{family}{head}")(config).float().eval()
    randomize(model, seed)
    return model
