"""The shape of the bundled model, and how its parameters are written as a Hugging Face folder."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from safetensors.flax import save_file

from flashsvd_jax.schema import flatten

HF_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
    "use_cache": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "torch_dtype": "bfloat16",
}


def hf_name(name: str) -> str:
    """Translates a canonical flat name, as `layers_0.mlp.up_proj.weight`, to the Hugging Face tensor name."""
    name = name.replace("layers_", "layers.").replace(".scale", ".weight")
    return name if name.startswith("lm_head") else f"model.{name}"


def save_model(params: Mapping[str, Any], folder: Path, facts: Mapping[str, Any]) -> None:
    """Writes config.json, model.safetensors (bfloat16) and training.json; a file appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    flat = flatten(jax.device_get(params))
    tensors = {hf_name(name): jnp.asarray(value, jnp.bfloat16) for name, value in flat.items()}
    temporary = folder / "model.safetensors.part"
    save_file(tensors, str(temporary), metadata={"format": "pt"})
    os.replace(temporary, folder / "model.safetensors")
    for name, value in (("config.json", HF_CONFIG), ("training.json", facts)):
        temporary = folder / f"{name}.part"
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, folder / name)
