"""A tiny compressed model with the bundled tokenizer, in transformers and as a folder of ours."""

import dataclasses
import shutil
from pathlib import Path

import hf_models
import pytest

from flashsvd_jax import bundled
from flashsvd_jax.checkpoint import Manifest, save_params
from flashsvd_jax.checkpoint.layout import companion_files
from flashsvd_jax.schema import count_params


@dataclasses.dataclass(frozen=True)
class Compressed:
    """The model, float32; some of its sites are dense, and its head is factorized."""

    reference: hf_models.Reference
    folder: Path


@pytest.fixture(scope="session")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Compressed:
    model = hf_models.build_model("qwen2", vocab_size=4096, bos_token_id=0, eos_token_id=0)
    ranks = hf_models.mixed_ranks(hf_models.reference_of(model).config)
    hf_models.factorize(model, ranks)
    reference = hf_models.reference_of(model, ranks)
    config = reference.config
    place = tmp_path_factory.mktemp("compressed")
    manifest = Manifest(
        family="svdllm", dtype="float32", factorization=config.factorization, params=count_params(config),
        params_dense=count_params(config.dense()), notes=("made by a test",),
    )  # fmt: skip
    tokenizer = [file for file in companion_files(bundled.DENSE) if file.name.startswith("tokenizer")]
    save_params(
        place / "model", reference.params, config, reference.model.config.to_dict(), manifest, copy_files=tokenizer
    )
    yield Compressed(reference, place / "model")
    shutil.rmtree(place)
