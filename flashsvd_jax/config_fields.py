"""Reading fields of a config.json that anyone may have written: each gives its value in range, or an error that names it."""

import math
from collections.abc import Mapping
from typing import Any

from flashsvd_jax.errors import ConfigError


def integer(fields: Mapping[str, Any], name: str, default: int | None = None, least: int = 1) -> int:
    """A whole number of at least ``least``; ``default`` where it is absent or null, an error where there is none."""
    value = fields.get(name)
    if value is None:
        return _default(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"config.json: {name} must be a whole number of at least {least}, not {value!r}")
    return value


def number(fields: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """A positive finite number; ``default`` likewise."""
    value = fields.get(name)
    return _default(name, default) if value is None else _positive(name, value)


def optional_number(fields: Mapping[str, Any], name: str) -> float | None:
    """A positive finite number, or None where it is absent or null."""
    value = fields.get(name)
    return None if value is None else _positive(name, value)


def numbers(fields: Mapping[str, Any], name: str) -> tuple[float, ...]:
    """A list of positive finite numbers, empty where it is absent or null."""
    values = fields.get(name)
    if values is None:
        return ()
    if not isinstance(values, list | tuple):
        raise ConfigError(f"config.json: {name} must be a list of numbers, not {values!r}")
    return tuple(_positive(name, value) for value in values)


def flag(fields: Mapping[str, Any], name: str, default: bool) -> bool:
    """True or false; ``default`` where it is absent or null."""
    value = fields.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ConfigError(f"config.json: {name} must be true or false, not {value!r}")
    return value


def token_ids(value: Any, name: str) -> tuple[int, ...]:
    """A token id, a list of them, or nothing."""
    ids = [] if value is None else value if isinstance(value, list | tuple) else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise ConfigError(f"{name} must be a token id or a list of them, not {value!r}")
    return tuple(i for i in ids if i >= 0)  # -1 stands for "none" in some configurations


# Names of activations in transformers -> those of `pallas_kernels`; its variants of gelu_tanh differ by rounding alone.
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


def activation(fields: Mapping[str, Any], name: str, default: str) -> str:
    """The activation that a field names in transformers' words, by its name here; that of ``default`` where it is absent."""
    given = fields.get(name, default)
    if not isinstance(given, str) or given not in _ACTIVATIONS:
        raise ConfigError(f"config.json: {name} {given!r} is not supported; supported: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[given]


def _positive(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(f"config.json: {name} must be a positive number, not {value!r}")
    return float(value)


def _default[T](name: str, default: T | None) -> T:
    if default is None:
        raise ConfigError(f"config.json: {name} is missing; give the base model's configuration")
    return default
