"""Tiny models to write and read."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy
import numpy as np
import pytest

from flashsvd_jax.checkpoint import FolderWriter, Manifest
from flashsvd_jax.config import ModelConfig
from flashsvd_jax.factorization import Factorization
from flashsvd_jax.schema import count_params, schema, stored_names

_SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
_SHARED = {"layers_1.self_attn.q_proj.down": "layers_0.self_attn.q_proj.down"}


@dataclasses.dataclass(frozen=True)
class TinyModel:
    """A model's description and its stored arrays, float32 values that every stored dtype holds exactly."""

    hf_config: dict[str, Any]
    config: ModelConfig
    manifest: Manifest
    arrays: dict[str, np.ndarray]

    def write(self, dst: Path, **options: Any) -> Path:
        with FolderWriter(dst, self.hf_config, self.manifest, **options) as writer:
            for name, array in self.arrays.items():
                writer.add(name, array)
        return dst

    def array(self, name: str) -> np.ndarray:
        """The values of any array of the model, shared ones included, in the stored dtype."""
        return self.arrays[self.config.factorization.owner_by_name.get(name, name)].astype(self.manifest.dtype)

    def with_manifest(self, **changes: Any) -> "TinyModel":
        return dataclasses.replace(self, manifest=dataclasses.replace(self.manifest, **changes))


def _tiny_model(
    model_type: str = "llama",
    dtype: str = "bfloat16",
    ranks: Mapping[str, int] | None = None,
    shared: Mapping[str, str] = _SHARED,
    **config_fields: Any,
) -> TinyModel:
    hf_config = {"model_type": model_type, **_SIZES, "architectures": ["Tiny"], "note": "Größe", **config_fields}
    if ranks is None:
        ranks = {"layers_0.self_attn.q_proj": 3, "layers_1.self_attn.q_proj": 3, "layers_1.mlp.down_proj": 5}
    config = ModelConfig.from_hf(hf_config, Factorization.of(ranks, shared))
    manifest = Manifest(
        family="svdllm",
        dtype=dtype,
        factorization=config.factorization,
        params=count_params(config),
        params_dense=count_params(config.dense()),
    )
    rng, specs = np.random.default_rng(0), schema(config)
    arrays = {name: rng.integers(-128, 128, specs[name].shape).astype(np.float32) / 64 for name in stored_names(config)}
    return TinyModel(hf_config, config, manifest, arrays)


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., TinyModel]:
    """Makes a tiny model: by default a Llama with three low-rank sites, two of which share an array."""
    return _tiny_model


@pytest.fixture
def model() -> TinyModel:
    return _tiny_model()
