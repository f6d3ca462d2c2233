"""The bundled model's files: within their size, the same model to PyTorch and to us, and as good as they claim."""

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from flashsvd_jax.config import ModelConfig
from flashsvd_jax.models.flax_module import Decoder
from flashsvd_jax.schema import nest, schema

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = ROOT / "flashsvd_jax" / "bundled"
MODEL = BUNDLED / "stdlib-llama"
CHECKPOINT = BUNDLED / "stdlib_llama_whitening_only_0.6.pt"
WINDOW = 1024
MEASURED_WINDOWS = 1  # of those that perplexity is the mean of; all of them would take minutes
AWKWARD_TEXTS = [
    "",
    "  two spaces first,\ttabs\tand trailing ones \t \n\n\n",
    "\r\ndef f(x):\r\n\treturn x<|endoftext|>y\r",
    "naïve café 日本語 \N{GRINNING FACE} \x00\x0b\x85\u2028 e\u0301 1234567 __init__ x''\"",
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def torch_model() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def our_logits() -> Any:
    """The bundled model as a function from tokens [batch, length] to float32 logits, computed in float32."""
    config = ModelConfig.from_hf(json.loads((MODEL / "config.json").read_text()))
    with safe_open(MODEL / "model.safetensors", framework="flax") as file:
        names = {name: _hf_name(name) for name in schema(config)}
        assert sorted(names.values()) == sorted(file.keys())
        params = nest({name: file.get_tensor(hf).astype(jnp.float32) for name, hf in names.items()})
    return jax.jit(lambda tokens: Decoder(config).apply(params, tokens))


@pytest.fixture(scope="module")
def heldout(tokenizer: Any) -> np.ndarray:
    """The held-out text between two end-of-text tokens, as it was measured when the model was trained."""
    text = (BUNDLED / "heldout.txt").read_bytes().decode()
    eos = tokenizer.eos_token_id
    return np.asarray([eos, *tokenizer(text)["input_ids"], eos], np.int32)


@pytest.fixture(scope="module")
def compressed(scripts: Any) -> dict[str, Any]:
    """Our own pickled checkpoint, loaded by PyTorch and widened to float32."""
    scripts.svd_llama.register()
    loaded = torch.load(CHECKPOINT, weights_only=False)
    return {"stored": loaded["model"].state_dict(), "tokenizer": loaded["tokenizer"], "model": loaded["model"].float()}


@pytest.fixture(scope="module")
def scripts() -> Iterator[Any]:
    """The compression script; its folder is on the path, as when it is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "bench" / "bundled_model"))
        yield importlib.import_module("compress_svdllm")
    for name in ("compress_svdllm", "svd_llama", "component", "component.svd_llama"):
        sys.modules.pop(name, None)


def _hf_name(name: str) -> str:
    return "model." + name.replace("layers_", "layers.").replace(".scale", ".weight")


def test_files_are_small_and_the_model_has_the_promised_size() -> None:
    training = json.loads((MODEL / "training.json").read_text())
    assert 4e6 <= training["parameters"] <= 8e6
    assert sum(file.stat().st_size for file in MODEL.iterdir()) <= 12e6
    assert CHECKPOINT.stat().st_size <= 9e6


@pytest.mark.parametrize("text", AWKWARD_TEXTS)
def test_tokenizer_gives_any_text_back(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_gives_the_heldout_text_back(tokenizer: Any, heldout: np.ndarray) -> None:
    assert tokenizer.decode(heldout[1:-1]) == (BUNDLED / "heldout.txt").read_bytes().decode()
    assert heldout.max() < len(tokenizer) == 4096


def test_indentation_is_one_token(tokenizer: Any) -> None:
    for depth in range(1, 5):
        assert len(tokenizer("\n" + "    " * depth)["input_ids"]) == 1


def test_generation_stops_at_end_of_text(tokenizer: Any, torch_model: Any) -> None:
    eos = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    config = torch_model.generation_config
    assert config is not None
    assert eos == tokenizer.eos_token_id == torch_model.config.eos_token_id == config.eos_token_id


def test_logits_equal_those_of_transformers(torch_model: Any, our_logits: Any, heldout: np.ndarray) -> None:
    tokens = heldout[: 2 * 200].reshape(2, 200)
    with torch.no_grad():
        expected = torch_model(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()
    assert np.abs(expected).max() > 5  # a trained model has something to say
    np.testing.assert_allclose(our_logits(tokens), expected, atol=1e-3)


def test_our_heldout_losses_are_those_of_pytorch(our_logits: Any, heldout: np.ndarray) -> None:
    recorded = json.loads((BUNDLED / "compression.json").read_text())["dense"]["heldout_window_losses"]
    for index in range(MEASURED_WINDOWS):
        window = heldout[index * WINDOW : (index + 1) * WINDOW + 1]
        scores = jax.nn.log_softmax(our_logits(window[None, :-1])[0])
        loss = -float(scores[jnp.arange(WINDOW), window[1:]].mean())
        assert loss == pytest.approx(recorded[index], abs=1e-3)


def test_recorded_perplexities_follow_from_the_recorded_losses(heldout: np.ndarray) -> None:
    training, compression = (json.loads(p.read_text()) for p in (MODEL / "training.json", BUNDLED / "compression.json"))
    for record in (compression["dense"], compression["compressed"]):
        losses = record["heldout_window_losses"]
        assert len(losses) == (len(heldout) - 1) // WINDOW
        assert record["heldout_perplexity"] == pytest.approx(math.exp(np.mean(losses)))
    dense, small = (compression[name]["heldout_perplexity"] for name in ("dense", "compressed"))
    assert training["heldout_perplexity"] == pytest.approx(dense, rel=0.01)
    assert dense < small < 3 * dense
    assert dense < 20


def test_checkpoint_has_the_published_structure(compressed: dict[str, Any]) -> None:
    attention, mlp = compressed["model"].model.layers[3].self_attn, compressed["model"].model.layers[3].mlp
    assert (type(attention).__module__, type(attention).__name__) == ("component.svd_llama", "SVD_LlamaAttention")
    assert (type(mlp).__module__, type(mlp).__name__) == ("component.svd_llama", "SVD_LlamaMLP")
    ranks = json.loads((BUNDLED / "compression.json").read_text())["ranks"]
    for site, rank in ranks.items():
        stem = site.removesuffix("_proj")
        u, v = (compressed["stored"][f"{stem}_{part}_proj.weight"] for part in "uv")
        d_out, d_in = u.shape[0], v.shape[1]
        assert u.shape[1] == v.shape[0] == rank == int(d_out * d_in * 0.6 / (d_out + d_in))
        assert u.dtype == v.dtype == torch.float16


def test_heldout_losses_are_what_compression_measured(
    compressed: dict[str, Any], torch_model: Any, heldout: np.ndarray, scripts: Any
) -> None:
    recorded = json.loads((BUNDLED / "compression.json").read_text())
    tokens = torch.from_numpy(heldout[: MEASURED_WINDOWS * WINDOW + 1].astype(np.int64))
    for name, model in (("dense", torch_model), ("compressed", compressed["model"])):
        expected = recorded[name]["heldout_window_losses"][:MEASURED_WINDOWS]
        assert scripts.window_losses(model, tokens, WINDOW) == pytest.approx(expected, abs=1e-3)


def test_tokenizer_in_the_checkpoint_is_the_same(compressed: dict[str, Any], tokenizer: Any) -> None:
    text = "    def f(self):\n        return self"
    assert compressed["tokenizer"](text)["input_ids"] == tokenizer(text)["input_ids"]
