"""Logits of a converted model against those of the base model in PyTorch, with the source's factors multiplied out.

An encoder without a head has hidden states in their place.
"""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from converters.encoder_naming import naming_of
from converters.plan import Plan
from converters.sources import TensorSource
from flashsvd_jax.any_config import AnyConfig
from flashsvd_jax.encoder_config import EncoderConfig
from flashsvd_jax.errors import ConversionError
from flashsvd_jax.schema import count_params, params_of_no_site, sites

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
    if isinstance(plan.config, EncoderConfig) and not plan.config.is_transformers:
        return "logits not compared: transformers has no encoder with a scaled embedding or a norm behind BERT's last layer"
    tokens = np.random.default_rng(_SEED).integers(plan.config.vocab_size, size=_SHAPE, dtype=np.int32)
    if isinstance(plan.config, EncoderConfig) and plan.config.first_position:
        # RoBERTa in transformers takes every padding token for padding, whatever the mask says.
        padding = plan.config.first_position - 1
        tokens = np.where(tokens == padding, (padding + 1) % plan.config.vocab_size, tokens).astype(np.int32)
    expected = _torch_logits(plan.config, hf_config, _dense_weights(source, plan), tokens)
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

    naming = naming_of(plan.config)
    weights = {naming.parameter(name)[0]: get(name) for name in params_of_no_site(plan.config)}
    for site in sites(plan.config):
        module = naming.module(site.name)
        if plan.config.factorization.rank(site.name) is None:
            weights[f"{module}.weight"] = get(f"{site.name}.weight")
        else:
            up, down = (get(f"{site.name}.{part}", np.float64) for part in ("up", "down"))
            product = up @ down.reshape(*up.shape[:-2], up.shape[-1], site.d_in)
            weights[f"{module}.weight"] = product.reshape(site.d_out, site.d_in).astype(np.float32)
        if naming.transposed and module != naming.head:
            weights[f"{module}.weight"] = weights[f"{module}.weight"].T
        if site.has_bias:
            weights[f"{module}.bias"] = get(f"{site.name}.bias")
    weights |= {twin: weights[kept] for twin, kept in naming.twins}
    return {naming.whole(name): weight for name, weight in weights.items()}


def _torch_logits(
    config: AnyConfig, hf_config: Mapping[str, Any], weights: Mapping[str, np.ndarray], tokens: np.ndarray
) -> np.ndarray:
    import torch
    import transformers

    hf = transformers.AutoConfig.for_model(**hf_config)
    auto = getattr(transformers, _auto_class(config))
    model = auto.from_config(hf, dtype=torch.float32, attn_implementation="eager").eval()
    differing = model.load_state_dict({name: torch.from_numpy(w) for name, w in weights.items()}, strict=False)
    naming = naming_of(config)
    missing = [name for name in differing.missing_keys if not naming.is_unused(naming.bare(name))]
    if missing or differing.unexpected_keys:
        raise ConversionError(
            f"transformers' model has other parameters: {', '.join(missing + differing.unexpected_keys)}"
        )
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long())[0].numpy()


def _auto_class(config: AnyConfig) -> str:
    """Name of the class in transformers that makes the model of a configuration."""
    if not isinstance(config, EncoderConfig):
        return "AutoModelForCausalLM"
    head = None if config.head is None else config.head.kind
    classes = {"masked_lm": "AutoModelForMaskedLM", "classification": "AutoModelForSequenceClassification"}
    return classes.get(str(head), "AutoModel")
