"""From a pickle to text: the bundled checkpoint is converted, loaded and run as `flashsvd demo` does it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import flashsvd_jax
import flashsvd_jax.errors
from flashsvd_jax.bundled import COMPRESSED, DENSE
from flashsvd_jax.errors import CheckpointError, RequestError
from flashsvd_jax.model import load

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled compressed checkpoint, converted."""
    path = tmp_path_factory.mktemp("bundled") / "model"
    flashsvd_jax.convert(COMPRESSED, path, base=DENSE, progress=False)
    return path


def test_every_public_name_is_there_and_every_error_among_them() -> None:
    assert all(hasattr(flashsvd_jax, name) for name in flashsvd_jax.__all__)
    errors = vars(flashsvd_jax.errors).values()
    raised = {found.__name__ for found in errors if isinstance(found, type) and issubclass(found, Exception)}
    assert raised <= set(flashsvd_jax.__all__) and flashsvd_jax.RequestError is RequestError


def test_the_bundled_checkpoint_generates_the_same_text_twice(folder: Path) -> None:
    model = load(folder, dtype="float32", max_length=64)
    options = {"temperature": 0.5, "seed": 3, "max_tokens": 8}
    first = flashsvd_jax.generate(model, "import os\n\n\ndef", **options)
    assert first and first == flashsvd_jax.generate(model, "import os\n\n\ndef", **options)


def test_weights_arrive_padded_packed_and_in_the_asked_type(folder: Path) -> None:
    model = load(folder, dtype="float32", max_length=64)
    params = flashsvd_jax.load_params(folder, dtype="float32")["params"]
    attention = params["layers_3"]["self_attn"]
    packed = model.weights.layers[3].qkv
    assert packed.first.dtype == np.float32 and packed.widths == (80, 32, 32)
    rank = attention["k_proj"]["down"].shape[0]
    start = packed.starts[1]
    np.testing.assert_array_equal(packed.first[start : start + rank], attention["k_proj"]["down"])
    assert not np.any(packed.first[start + rank : start + 32]) and not np.any(packed.ups[1][:, rank:])


def test_options_that_cannot_be_met_are_refused(folder: Path) -> None:
    with pytest.raises(RequestError, match="dtype 'int8' is not one of"):
        load(folder, dtype="int8")
    for length in (0, 1, 10**6):
        with pytest.raises(RequestError, match="max_length must be from 2 to the 1024 positions"):
            load(folder, max_length=length)


def test_a_damaged_generation_config_is_named(folder: Path) -> None:
    file = folder / "generation_config.json"
    text = file.read_text()
    try:
        for bad in ("[", "[]", '{"eos_token_id": "x"}'):
            file.write_text(bad)
            with pytest.raises(flashsvd_jax.errors.FlashSVDError, match="generation_config"):
                load(folder, max_length=64)
        file.write_text(json.dumps({"eos_token_id": [5, 7]}))
        assert load(folder, max_length=64).config.eos_token_ids == (5, 7)
    finally:
        file.write_text(text)


def test_a_folder_without_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        if "token" not in file.name:
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(CheckpointError, match="no usable tokenizer"):
        load(tmp_path, max_length=64)


def test_the_readme_says_what_was_measured() -> None:
    command = [sys.executable, str(ROOT / "bench" / "report.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(ROOT)})
    assert result.returncode == 0, result.stderr
