"""A tiny dense model with the bundled tokenizer: in transformers, as a Hugging Face folder, and as a folder of ours."""

import dataclasses
import shutil
from pathlib import Path

import hf_models
import pytest

from converters import convert
from flashsvd_jax.bundled import DENSE
from flashsvd_jax.checkpoint.layout import companion_files
from flashsvd_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Dense:
    """The model in its forms, float32."""

    reference: hf_models.Reference
    hugging_face: Path
    folder: Path

    @property
    def config(self) -> ModelConfig:
        return self.reference.config


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Dense:
    """Qwen2 has biases, which are no part of any factor; its windows differ from layer to layer."""
    model = hf_models.build_model("qwen2", vocab_size=4096, bos_token_id=0, eos_token_id=0)
    place = tmp_path_factory.mktemp("dense")
    model.save_pretrained(place / "hf")
    for file in companion_files(DENSE):
        if file.name.startswith("tokenizer"):
            shutil.copy(file, place / "hf")
    convert(place / "hf", place / "ours", dtype="float32", progress=False)
    return Dense(hf_models.reference_of(model), place / "hf", place / "ours")
