"""Reading an encoder's Hugging Face config: agreement with transformers' classes, one clear error for what is not computed."""

import json
from typing import Any

import pytest
import transformers
from hf_encoders import ARCHITECTURES, HEADS, build_encoder

from flashsvd_jax.any_config import config_from_hf
from flashsvd_jax.config import ModelConfig
from flashsvd_jax.encoder_config import EncoderConfig
from flashsvd_jax.encoder_head_config import HeadConfig
from flashsvd_jax.errors import ConfigError

BERT: dict[str, Any] = {
    "model_type": "bert", "vocab_size": 50, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
DISTILBERT: dict[str, Any] = {
    "model_type": "distilbert", "vocab_size": 50, "dim": 24, "hidden_dim": 20, "n_layers": 3, "n_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
MODERN = {"model_type": "modernbert"}
FAMILIES = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta", "camembert": "Camembert"}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if not name.startswith("modernbert")])
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


@pytest.mark.parametrize("architecture", ["modernbert", "modernbert_bias"])
def test_describes_the_modernbert_that_transformers_builds(architecture: str) -> None:
    model = build_encoder(architecture, "ForSequenceClassification")
    config, layers = EncoderConfig.from_hf(model.config.to_dict()), model.model.layers
    # transformers' window has one more, for a library that takes it so; its masks do not.
    windows = [layer.attn.sliding_window and layer.attn.sliding_window - 1 for layer in layers]
    thetas = [model.config.rope_parameters[layer.attention_type]["rope_theta"] for layer in layers]
    assert list(config.windows) == windows and {3, None} == set(windows)
    assert [rope and rope.theta for rope in config.ropes] == thetas and len(set(thetas)) == 2
    assert config.norm_bias is (model.model.final_norm.bias is not None)
    assert config.attention_bias is (layers[0].attn.Wqkv.bias is not None)
    assert config.mlp_bias is (layers[0].mlp.Wi.bias is not None)
    assert config.head is not None
    assert (config.head.dense_bias, config.head.pooling) == (config.norm_bias, "mean" if config.norm_bias else "cls")


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"global_attn_every_n_layers": 2, "local_attention": 9},
        {"global_rope_theta": 5e5, "local_rope_theta": 2e4},
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 3e5}}},
    ],
)
def test_fields_of_modernbert_mean_what_transformers_takes_them_for(fields: dict[str, Any]) -> None:
    raw = BERT | fields
    del raw["model_type"]
    hf = transformers.ModernBertConfig(
        **raw, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2
    )
    found = EncoderConfig.from_hf(raw | {"model_type": "modernbert"})
    assert found == EncoderConfig.from_hf(hf.to_dict())
    thetas = [hf.rope_parameters[kind]["rope_theta"] for kind in hf.layer_types]
    assert [rope and rope.theta for rope in found.ropes] == thetas
    assert found.windows == tuple(None if kind == "full_attention" else hf.sliding_window for kind in hf.layer_types)


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
        (
            MODERN | {"layer_types": ["full_attention"]},
            "layer_types must name full_attention or sliding_attention for each",
        ),
        (MODERN | {"layer_types": ["full_attention", "chunked", "chunked"]}, "layer_types must name"),
        (MODERN | {"global_attn_every_n_layers": 0}, "global_attn_every_n_layers must be a whole number"),
        (MODERN | {"hidden_size": 12}, "heads of 3 columns cannot be rotated"),
        (MODERN | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters must hold sets of values"),
        (
            MODERN | {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}},
            "rope scaling 'yarn' is not supported",
        ),
        (MODERN | {"rope_parameters": {"full_attention": 3}}, "rope_parameters must hold sets of values"),
        (
            MODERN | {"architectures": ["ModernBertForSequenceClassification"], "classifier_pooling": "max"},
            "classifier_pooling must be cls or mean, not 'max'",
        ),
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
    with pytest.raises(ConfigError, match=r"model_type 'bloom' is not supported; supported: llama, .*, bert, roberta"):
        config_from_hf({"model_type": "bloom"})
    with pytest.raises(ConfigError, match="model_type is missing"):
        config_from_hf({})
