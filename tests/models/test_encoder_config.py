"""Reading an encoder's Hugging Face config: agreement with transformers' classes, one clear error for what is not computed."""

import json
from typing import Any

import pytest
import transformers
from hf_encoders import ARCHITECTURES, HEADS, build_encoder

from flashsvd_jax.any_config import config_from_hf
from flashsvd_jax.config import ModelConfig
from flashsvd_jax.encoder_config import EncoderConfig, HeadConfig
from flashsvd_jax.errors import ConfigError

BERT: dict[str, Any] = {
    "model_type": "bert", "vocab_size": 50, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
DISTILBERT: dict[str, Any] = {
    "model_type": "distilbert", "vocab_size": 50, "dim": 24, "hidden_dim": 20, "n_layers": 3, "n_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
FAMILIES = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta", "camembert": "Camembert"}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_describes_the_model_that_transformers_builds(architecture: str, head: str) -> None:
    model = build_encoder(architecture, head)
    hf, config, body = model.config, EncoderConfig.from_hf(model.config.to_dict()), model.base_model
    embeddings = body.embeddings
    types = getattr(embeddings, "token_type_embeddings", None)
    rows, width = embeddings.position_embeddings.weight.shape
    assert (config.vocab_size, config.hidden_size) == tuple(embeddings.word_embeddings.weight.shape)
    assert config.num_types == (0 if types is None else types.weight.shape[0])
    assert (config.first_position + config.max_position, config.hidden_size) == (rows, width)
    assert (config.num_layers, config.num_heads) == (hf.num_hidden_layers, hf.num_attention_heads)
    assert config.norm_eps == embeddings.LayerNorm.eps
    assert config.model_type == hf.model_type
    assert (config.head is None) is (head == "Model")
    if config.head is not None:
        out = model.get_output_embeddings() or getattr(model.classifier, "out_proj", model.classifier)
        tied = out.weight is embeddings.word_embeddings.weight
        assert (config.head.outputs, config.head.tied) == (out.weight.shape[0], tied)


@pytest.mark.parametrize("kind", FAMILIES)
def test_absent_fields_mean_what_transformers_takes_them_for(kind: str) -> None:
    raw = BERT | {"model_type": kind}
    hf = getattr(transformers, f"{FAMILIES[kind]}Config")(**{k: v for k, v in raw.items() if k != "model_type"})
    assert EncoderConfig.from_hf(raw) == EncoderConfig.from_hf(hf.to_dict())
    assert EncoderConfig.from_hf(raw) == EncoderConfig.from_hf(json.loads(hf.to_json_string(use_diff=True)))


def test_heads_by_class_and_labels_by_name() -> None:
    def head(config: dict[str, Any], architecture: str, **fields: Any) -> HeadConfig | None:
        return EncoderConfig.from_hf(config | {"architectures": [architecture], **fields}).head

    assert head(BERT, "BertModel") is None
    assert EncoderConfig.from_hf(BERT).head is None
    assert head(BERT, "BertForPreTraining") == head(BERT, "BertForMaskedLM")
    assert head(BERT, "BertForSequenceClassification") == HeadConfig("classification", 2, "tanh")
    labels = {"0": "no", "1": "yes", "2": "perhaps"}
    assert head(DISTILBERT, "DistilBertForSequenceClassification", id2label=labels) == HeadConfig(
        "classification", 3, "relu"
    )
    relu = head(BERT, "BertForMaskedLM", hidden_act="relu")
    assert relu is not None and relu.activation == "relu"
    roberta = head(BERT | {"model_type": "roberta", "hidden_act": "relu"}, "RobertaForMaskedLM")
    assert roberta is not None and roberta.activation == "gelu"  # whatever the layers have


def test_positions_of_roberta_begin_behind_the_padding_token() -> None:
    config = EncoderConfig.from_hf(BERT | {"model_type": "roberta", "pad_token_id": 5})
    assert (config.first_position, config.max_position) == (6, 58)
    assert EncoderConfig.from_hf(BERT | {"pad_token_id": 5}).first_position == 0


REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@pytest.mark.parametrize(
    ("base", "field"),
    [
        *((BERT, field) for field in (*REQUIRED, "max_position_embeddings")),
        *((DISTILBERT, field) for field in ("dim", "hidden_dim", "n_layers", "n_heads", "max_position_embeddings")),
    ],
)
def test_a_missing_field_is_named(base: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=f"config.json: {field} is missing"):
        EncoderConfig.from_hf({name: value for name, value in base.items() if name != field})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "electra"}, "model_type 'electra' is no encoder's; known: bert, roberta"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key' is not supported"),
        ({"position_embedding_type": "relative_key_query"}, "position_embedding_type 'relative_key_query' is not"),
        ({"hidden_act": "mish"}, "hidden_act 'mish' is not supported; supported: gelu"),
        ({"hidden_act": ["gelu"]}, "hidden_act .* is not supported"),
        ({"is_decoder": True}, "is_decoder is true; encoders alone"),
        ({"add_cross_attention": True}, "add_cross_attention is true"),
        ({"num_attention_heads": 5}, "5 attention heads do not divide 24"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000 is beyond"),
        ({"layer_norm_eps": 0}, "layer_norm_eps must be a positive number"),
        ({"type_vocab_size": 0}, "type_vocab_size must be a whole number"),
        ({"model_type": "roberta", "pad_token_id": 63}, "max_position_embeddings 64 leaves no position"),
        ({"model_type": "roberta", "pad_token_id": -1}, "pad_token_id must be a whole number of at least 0"),
        ({"architectures": ["BertForQuestionAnswering"]}, "head of BertForQuestionAnswering is not supported"),
        ({"architectures": ["BertForSequenceClassification"], "id2label": []}, "id2label must name the labels"),
        ({"architectures": ["BertForSequenceClassification"], "num_labels": 0}, "num_labels must be a whole number"),
        ({"architectures": ["BertForMaskedLM"], "tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
    ],
)
def test_what_is_not_computed_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"config.json: (the )?{message}"):
        EncoderConfig.from_hf(BERT | fields)


def test_a_config_of_any_model_is_read_by_its_type() -> None:
    assert config_from_hf(BERT) == EncoderConfig.from_hf(BERT)
    llama = BERT | {"model_type": "svdllm-llama", "rms_norm_eps": 1e-5}
    assert config_from_hf(llama) == ModelConfig.from_hf(llama)
    with pytest.raises(ConfigError, match=r"model_type 'gpt2' is not supported; supported: llama, .*, bert, roberta"):
        config_from_hf({"model_type": "gpt2"})
    with pytest.raises(ConfigError, match="model_type is missing"):
        config_from_hf({})
