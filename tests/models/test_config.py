"""Reading a Hugging Face config: agreement with transformers' own classes, and one clear error for what is not computed."""

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
import transformers
from hf_models import ARCHITECTURES, build_model, canonical_tensors, factorize, mixed_ranks

from flashsvd_jax.config import ModelConfig
from flashsvd_jax.errors import CheckpointError, ConfigError
from flashsvd_jax.factorization import Factorization
from flashsvd_jax.schema import check_shapes, mismatches, schema

LLAMA_LIKE = tuple(name for name in ARCHITECTURES if name.startswith(("llama", "mistral", "qwen")))
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in LLAMA_LIKE),
    ("llama", {"attention_bias": True}),
    ("llama", {"mlp_bias": True}),
    ("llama", {"hidden_act": "gelu"}),
    ("mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    ("qwen2", {"use_sliding_window": False, "layer_types": None}),
    ("qwen2", {"layer_types": None, "max_window_layers": 1}),
    ("qwen3", {"attention_bias": True, "use_sliding_window": False, "eos_token_id": [3, 4], "bos_token_id": 5}),
]
FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
LONGROPE = {"original_max_position_embeddings": 32, "short_factor": [1.0] * 3, "long_factor": [2.0] * 3}
OTHERS = {"Phi3": "phi3", "Gemma2": "gemma2", "Gemma3Text": "gemma3_text", "OPT": "opt", "GPT2": "gpt2"}


def minimal(**fields: Any) -> dict[str, Any]:
    """The least that a config says; a field given as None is left out."""
    raw = {"model_type": "llama", "vocab_size": 50, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 3,
           "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}  # fmt: skip
    return {name: value for name, value in {**raw, **fields}.items() if value is not None}


def scaled(rope_type: str, **fields: Any) -> dict[str, Any]:
    return {"rope_scaling": {"rope_type": rope_type, **fields}}


@pytest.mark.parametrize(("architecture", "overrides"), VARIANTS)
def test_describes_the_model_that_transformers_builds(architecture: str, overrides: dict[str, Any]) -> None:
    model = build_model(architecture, **overrides)
    hf, config = model.config, ModelConfig.from_hf(model.config.to_dict())
    attention = [layer.self_attn for layer in model.model.layers]
    windows = [getattr(a, "sliding_window", getattr(hf, "sliding_window", None)) for a in attention]
    eos = hf.eos_token_id if isinstance(hf.eos_token_id, list) else [hf.eos_token_id]
    others = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    assert dataclasses.asdict(config) | {"rope": None} == others | {
        "model_type": hf.model_type,
        "vocab_size": hf.vocab_size,
        "hidden_size": hf.hidden_size,
        "intermediate_size": hf.intermediate_size,
        "num_layers": hf.num_hidden_layers,
        "num_heads": hf.num_attention_heads,
        "num_kv_heads": hf.num_key_value_heads,
        "head_dim": attention[0].head_dim,
        "max_position": hf.max_position_embeddings,
        "norm_eps": hf.rms_norm_eps,
        "activation": hf.hidden_act,
        "rope": None,
        "windows": tuple(windows),
        "qkv_bias": attention[0].q_proj.bias is not None,
        "o_bias": attention[0].o_proj.bias is not None,
        "mlp_bias": model.model.layers[0].mlp.up_proj.bias is not None,
        "qk_norm": hasattr(attention[0], "q_norm"),
        "tie_embeddings": hf.tie_word_embeddings,
        "bos_token_id": hf.bos_token_id,
        "eos_token_ids": tuple(token for token in eos if token is not None),
        "factorization": dataclasses.asdict(Factorization()),
    }
    assert config.rope.theta == hf.rope_parameters["rope_theta"]
    check_shapes(config, {name: tensor.shape for name, tensor in canonical_tensors(model).items()}, architecture)


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_of_each_family_are_read_alike_from_a_whole_and_from_a_saved_config(family: str) -> None:
    hf = getattr(transformers, f"{family}Config")()
    whole = ModelConfig.from_hf(hf.to_dict())
    assert whole == ModelConfig.from_hf(json.loads(hf.to_json_string(use_diff=True)))
    assert (whole.head_dim, whole.windows[-1]) == (128, hf.sliding_window if family == "Mistral" else None)


@pytest.mark.parametrize("family", OTHERS)
def test_defaults_of_other_models_are_those_of_their_classes(family: str) -> None:
    hf = getattr(transformers, f"{family}Config")()
    whole = ModelConfig.from_hf(hf.to_dict())
    assert whole == ModelConfig.from_hf(json.loads(hf.to_json_string(use_diff=True)))
    kept = {"model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "max_position_embeddings", "rms_norm_eps", "ffn_dim", "n_embd", "n_head", "n_layer", "n_positions"}  # fmt: skip
    least = ModelConfig.from_hf({name: value for name, value in hf.to_dict().items() if name in kept})
    tokens = {"bos_token_id": None, "eos_token_ids": ()}  # no token ends a text unless the config names it
    assert least == dataclasses.replace(whole, **tokens)


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name not in LLAMA_LIKE])
def test_shapes_of_other_models_are_those_that_transformers_builds(architecture: str) -> None:
    model = build_model(architecture)
    config = ModelConfig.from_hf(model.config.to_dict())
    check_shapes(config, {name: tensor.shape for name, tensor in canonical_tensors(model).items()}, architecture)


@pytest.mark.parametrize(
    ("fields", "rope"),
    [
        ({"rope_scaling": {"type": "su", "short_factor": [1.0] * 3, "long_factor": [2.0] * 3}}, {"kind": "longrope"}),
        ({"rope_scaling": {"type": "yarn", "short_factor": [1.0] * 3, "long_factor": [2.0] * 3}}, {"kind": "longrope"}),
        ({"partial_rotary_factor": 0.5, "num_attention_heads": 2}, {"partial": 0.5}),
    ],
)
def test_rotations_of_phi_have_other_names_and_may_be_partial(fields: dict[str, Any], rope: dict[str, Any]) -> None:
    config = ModelConfig.from_hf(minimal(model_type="phi3", **fields))
    assert {name: getattr(config.rope, name) for name in rope} == rope


def test_gemma3_before_transformers_5_names_two_bases() -> None:
    old = {"model_type": "gemma3_text", "rope_theta": 5e5, "rope_local_base_freq": 2e4, "sliding_window_pattern": 3,
           "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window": 7, "head_dim": 8}  # fmt: skip
    config = ModelConfig.from_hf(minimal(**old))
    assert config.windows == (7, 7, None)
    assert [(rope.theta, rope.kind, rope.factor) for rope in config.ropes] == [
        (5e5, "linear", 8.0),
        (2e4, "default", 1.0),
    ]
    assert [config.rotation(window) for window in config.windows] == [1, 1, 0]


OPT = {"model_type": "opt", "ffn_dim": 20}
GPT2 = {"model_type": "gpt2", "n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 64}
GEMMA3 = {"model_type": "gemma3_text", "head_dim": 8}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({**OPT, "do_layer_norm_before": False}, "do_layer_norm_before False is not supported: norms stand before"),
        ({**OPT, "word_embed_proj_dim": 12}, "word_embed_proj_dim 12 is not supported: the embedding is as wide as the layers, 24"),
        ({**OPT, "_remove_final_layer_norm": True}, "_remove_final_layer_norm True is not supported"),
        ({**OPT, "activation_function": "tanh"}, "activation_function 'tanh' is not supported"),
        ({**OPT, "num_attention_heads": 5}, "hidden_size 24 is not a multiple of num_attention_heads 5"),
        ({**GPT2, "add_cross_attention": True}, "add_cross_attention True is not supported"),
        ({**GPT2, "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True is not supported"),
        ({**GPT2, "n_layer": 10**9}, "num_hidden_layers 1000000000 is beyond"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention True is not supported"),
        ({"model_type": "gemma2", "attn_logit_softcapping": -1.0}, "attn_logit_softcapping must be a positive number"),
        ({"model_type": "gemma2", "query_pre_attn_scalar": 0}, "query_pre_attn_scalar must be a positive number"),
        ({**GEMMA3, "attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0 is not supported: Gemma 3 bounds no scores"),
        ({**GEMMA3, "rope_parameters": {"rope_type": "default"}}, "rope_parameters must hold a set of values for each of"),
        ({**GEMMA3, "rope_parameters": {"full_attention": 3}}, "rope_parameters must hold a set of values for each of"),
        ({"model_type": "phi3", "partial_rotary_factor": 0.5}, "head_dim 6, of which 3 columns are rotated, is odd or too small"),
        ({"model_type": "phi3", **scaled("longrope", **LONGROPE), "partial_rotary_factor": 0.7},
         "short_factor has 3 entries, head_dim needs 2"),
    ],
)  # fmt: skip
def test_what_other_models_do_not_compute_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"config.json:( rope)? {message}"):
        ModelConfig.from_hf(minimal(**fields))


@pytest.mark.parametrize(
    ("family", "given"),
    [
        *((family, {}) for family in FAMILIES),
        *((family, {"num_key_value_heads": None, "num_attention_heads": 32, "head_dim": 2}) for family in FAMILIES),
        *((family, {"use_sliding_window": True, "max_window_layers": 1}) for family in ("Qwen2", "Qwen3")),
    ],
)
def test_absent_fields_mean_what_transformers_takes_them_for(family: str, given: dict[str, Any]) -> None:
    raw = minimal(model_type=family.lower(), hidden_size=64, **given)
    fields = {name: value for name, value in raw.items() if name != "model_type"}
    hf = getattr(transformers, f"{family}Config")(**fields)
    tokens = {"bos_token_id": None, "eos_token_ids": ()}  # no token ends a text unless the config names it
    assert ModelConfig.from_hf(raw) == dataclasses.replace(ModelConfig.from_hf(hf.to_dict()), **tokens)


def test_windows_of_qwen_come_from_max_window_layers_where_layer_types_are_not_written() -> None:
    window = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 7}
    assert ModelConfig.from_hf(minimal(**window, max_window_layers=2)).windows == (None, None, 7)
    assert ModelConfig.from_hf(minimal(**window)).windows == (None,) * 3  # the first 28 layers by default
    named = ["sliding_attention", "full_attention", "sliding_attention"]
    assert ModelConfig.from_hf(minimal(**window, max_window_layers=0, layer_types=named)).windows == (7, None, 7)


def test_key_value_heads_left_null_are_as_many_as_heads() -> None:
    assert ModelConfig.from_hf(minimal() | {"num_key_value_heads": None}).num_kv_heads == 4


@pytest.mark.parametrize("alias", [f"lowrank_{family.lower()}" for family in FAMILIES] + ["svdllm_llama"])
def test_types_that_svd_families_write_stand_for_their_base(alias: str) -> None:
    base = alias.split("_")[1]
    assert ModelConfig.from_hf(minimal(model_type=alias)) == ModelConfig.from_hf(minimal(model_type=base))


@pytest.mark.parametrize(
    "field",
    ["model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
     "max_position_embeddings", "rms_norm_eps"],
)  # fmt: skip
def test_a_missing_field_is_named(field: str) -> None:
    with pytest.raises(ConfigError, match=f"config.json: {field} is missing"):
        ModelConfig.from_hf(minimal(**{field: None}))


WINDOWED = {"model_type": "qwen3", "head_dim": 6, "use_sliding_window": True, "sliding_window": 4}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "bloom"}, "model_type 'bloom' is not supported; supported: llama, mistral, qwen2, qwen3, phi3"),
        ({"head_dim": 5}, "head_dim 5 is odd"),
        ({"head_dim": 2, **scaled("dynamic", factor=2.0)}, "head_dim 2 is odd or too small"),
        ({"hidden_size": 25}, "hidden_size 25 is not a multiple of num_attention_heads 4; give head_dim"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu' is not supported; supported: gelu, gelu_new"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor 0.25 is not supported"),
        ({"rope_scaling": {"partial_rotary_factor": 0.75}}, "partial_rotary_factor 0.75 is not supported"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "sets by layer type are not supported"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000 is beyond"),
        (scaled("xpos", factor=2.0), "rope scaling 'xpos' is not known; known: default, linear"),
        ({"rope_scaling": {"type": "ntk"}}, "rope scaling 'ntk' is not known"),
        (scaled("linear"), "rope scaling 'linear' needs a factor"),
        (scaled("dynamic"), "rope scaling 'dynamic' needs a factor"),
        (scaled("llama3", factor=8.0), "rope scaling 'llama3' needs original_max_position_embeddings"),
        (scaled("llama3", factor=8.0, original_max_position_embeddings=32, low_freq_factor=4.0), "low_freq_factor must be below"),
        (scaled("longrope", factor=2.0), "rope scaling 'longrope' needs short_factor and long_factor"),
        (scaled("longrope", **{**LONGROPE, "original_max_position_embeddings": 1}), "original_max_position_embeddings above 1"),
        (scaled("longrope", **{**LONGROPE, "long_factor": []}), "rope scaling 'longrope' needs short_factor and long_factor"),
        (scaled("longrope", **{**LONGROPE, "long_factor": [1.0] * 4}), "long_factor has 4 entries, head_dim needs 3"),
        (scaled("longrope", **{**LONGROPE, "short_factor": [1.0] * 2}), "short_factor has 2 entries, head_dim needs 3"),
        ({**WINDOWED, "layer_types": ["full_attention"] * 4}, "layer_types must name .* for each of 3 layers"),
        ({**WINDOWED, "layer_types": ["full_attention", "chunked", "chunked"]}, "layer_types must name sliding_attention or"),
    ],
)  # fmt: skip
def test_what_is_not_computed_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_hf(minimal(**fields))


INTEGERS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim",
            "num_key_value_heads", "max_position_embeddings")  # fmt: skip
FLAGS = ("attention_bias", "mlp_bias", "tie_word_embeddings")
SCALES = ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor", "mscale")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        *(({name: bad}, f"{name} must be a whole number") for name in INTEGERS
          for bad in (0, -2, 2.5, "8", [8], True, 2**31, 10**400)),
        *(({name: bad}, f"{name} must be true or false") for name in FLAGS for bad in ("false", 1)),
        *(({name: bad}, f"{name} must be a token id") for name in ("bos_token_id", "eos_token_id") for bad in ("2", 2.5)),
        *(({name: bad}, f"{name} must be a positive number") for name in ("rms_norm_eps", "rope_theta")
          for bad in (0, -1.0, math.nan, math.inf, "1e-5", 1e300, 1e-300, 10**400)),
        *((scaled("yarn", **{name: bad}), f"{name} must be a positive number") for name in SCALES for bad in (-1, "2", math.nan)),
        (scaled("longrope", **{**LONGROPE, "long_factor": [1.0, 0.0, 1.0]}), "long_factor must be a positive number"),
        (scaled("longrope", **{**LONGROPE, "short_factor": 2.0}), "short_factor must be a list of numbers"),
        ({"rope_theta": 1.0}, "rope_theta must be above 1"),
        *(({"model_type": "gemma3_text", "rope_parameters": bad}, "rope_parameters must hold a set of values")
          for bad in ([{"rope_type": "linear"}], 3)),
        ({"rope_scaling": "linear"}, "rope_parameters must be one set of values"),
        ({**WINDOWED, "sliding_window": 0}, "sliding_window must be a whole number"),
        ({**WINDOWED, "max_window_layers": -1}, "max_window_layers must be a whole number of at least 0"),
        ({**WINDOWED, "layer_types": "full_attention"}, "layer_types must name"),
        ({**WINDOWED, "use_sliding_window": "yes"}, "use_sliding_window must be true or false"),
    ],
)  # fmt: skip
def test_a_damaged_field_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"config.json: {message}"):
        ModelConfig.from_hf(minimal(**fields))


def test_a_config_is_hashable_and_forgets_its_factorization_when_asked() -> None:
    ranks = {"layers_0.mlp.up_proj": 4}
    config = ModelConfig.from_hf(minimal(), Factorization.of(ranks))
    assert hash(config) == hash(ModelConfig.from_hf(minimal(), Factorization.of(ranks)))
    assert (config.factorization.rank("layers_0.mlp.up_proj"), config.factorization.rank("lm_head")) == (4, None)
    assert config.dense() == ModelConfig.from_hf(minimal())


def test_shapes_of_a_factorized_model_are_checked_by_name() -> None:
    model = build_model("llama_bias")
    ranks = mixed_ranks(ModelConfig.from_hf(model.config.to_dict()))
    factorize(model, ranks)
    config = ModelConfig.from_hf(model.config.to_dict(), Factorization.of(ranks))
    shapes = {name: np.shape(tensor) for name, tensor in canonical_tensors(model).items()}
    check_shapes(config, shapes, "file")
    del shapes["norm.scale"]
    shapes |= {"layers_0.mlp.up_proj.down": (3, 40), "layers_0.mlp.extra": (1,)}
    rank = ranks["layers_0.mlp.up_proj"]
    assert list(mismatches(config, shapes)) == [
        "missing: norm.scale [40]",
        "unexpected: layers_0.mlp.extra [1]",
        f"mis-shaped: layers_0.mlp.up_proj.down is [3, 40], the configuration makes it [{rank}, 40]",
    ]
    with pytest.raises(CheckpointError, match="file does not hold this model, 3 problems"):
        check_shapes(config, shapes, "file")
    with pytest.raises(CheckpointError, match=r"sites the model does not have: layers_9\.mlp\.up_proj"):
        schema(dataclasses.replace(config, factorization=Factorization.of({"layers_9.mlp.up_proj": 2})))
