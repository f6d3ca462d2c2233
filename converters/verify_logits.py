"""Logits of a converted model against those of the base model in PyTorch, with the source's factors multiplied out."""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from converters.naming import torch_name
from converters.plan import Plan, params_of_no_site
from converters.sources import TensorSource
from flashsvd_jax.errors import ConversionError
from flashsvd_jax.schema import count_params, sites

LogitsFunction = Callable[[Path, np.ndarray], np.ndarray]
"""Folder and int32 tokens [batch, tokens] -> logits [batch, tokens, vocab] in float32 arithmetic.

The conversion itself never runs a model, so whoever has an engine passes this in.
"""

_SEED = 0
_SHAPE = (2, 12)  # sequences, tokens
_MAX_BYTES = 2e9  # of the dense model in float32; PyTorch and the converted model hold it once each
_TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}  # of the largest logit


def compare_logits(
    source: TensorSource,
    plan: Plan,
    hf_config: Mapping[str, Any],
    path: Path,
    dtype: np.dtype,
    logits_fn: LogitsFunction | None,
) -> str:
    """The largest difference on random tokens, or why there is none, in words.

    Raises:
      ConversionError: the difference is too large.
    """
    if logits_fn is None:
        return "logits not compared: no function to compute them was given"
    if find_spec("torch") is None:
        return "logits not compared: PyTorch is not installed"
    if 4 * count_params(plan.config.dense()) > _MAX_BYTES:
        return f"logits not compared: the dense model takes more than {_MAX_BYTES / 1e9:g} GB in float32"
    tokens = np.random.default_rng(_SEED).integers(plan.config.vocab_size, size=_SHAPE, dtype=np.int32)
    expected = _torch_logits(hf_config, _dense_weights(source, plan), tokens)
    difference = float(np.abs(np.asarray(logits_fn(path, tokens)) - expected).max())
    exact = all(np.can_cast(info.dtype, dtype) for info in plan.tensors.values())
    allowed = _TOLERANCES["float32" if exact else dtype.name] * max(1.0, float(np.abs(expected).max()))
    if not difference <= allowed:
        raise ConversionError(
            f"{path} does not verify: logits differ from PyTorch's by {difference:.1e}, not {allowed:.1e}"
        )
    return f"logits of {tokens.size} tokens, largest difference from PyTorch {difference:.1e}"


def _dense_weights(source: TensorSource, plan: Plan) -> dict[str, np.ndarray]:
    """The base model's state dict in float32, low-rank weights multiplied out in float64."""

    def get(name: str, dtype: type = np.float32) -> np.ndarray:
        return source.get(plan.tensors[name].name).astype(dtype)

    weights = {torch_name(name): get(name) for name in params_of_no_site(plan.config)}
    for site in sites(plan.config):
        module = torch_name(site.name)
        if plan.config.factorization.rank(site.name) is None:
            weights[f"{module}.weight"] = get(f"{site.name}.weight")
        else:
            product = get(f"{site.name}.up", np.float64) @ get(f"{site.name}.down", np.float64)
            weights[f"{module}.weight"] = product.astype(np.float32)
        if site.has_bias:
            weights[f"{module}.bias"] = get(f"{site.name}.bias")
    if plan.config.tie_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    return weights


def _torch_logits(hf_config: Mapping[str, Any], weights: Mapping[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**hf_config)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    model.load_state_dict({name: torch.from_numpy(weight) for name, weight in weights.items()})
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.numpy()
