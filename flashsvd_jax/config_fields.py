"""Reading fields of a config.json that anyone may have written: each gives its value in range, or an error that names it."""

import reprlib
from collections.abc import Mapping
from typing import Any

from flashsvd_jax.errors import ConfigError

_MOST_WHOLE = 2**31 - 1
_LEAST, _MOST = 2.0**-126, 2.0**127  # of float32, in which they are computed with


def integer(fields: Mapping[str, Any], name: str, default: int | None = None, least: int = 1) -> int:
    """A whole number of at least ``least``, below 2 ** 31; ``default`` where it is absent or null, an error where there is none."""
    value = fields.get(name)
    if value is None:
        return _default(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _MOST_WHOLE:
        raise ConfigError(
            f"config.json: {name} must be a whole number of at least {least}, below 2 ** 31, not {reprlib.repr(value)}"
        )
    return value


def number(fields: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """A positive number that float32 holds; ``default`` likewise."""
    value = fields.get(name)
    return _default(name, default) if value is None else _positive(name, value)


def optional_number(fields: Mapping[str, Any], name: str) -> float | None:
    """A positive number that float32 holds, or None where it is absent or null."""
    value = fields.get(name)
    return None if value is None else _positive(name, value)


def numbers(fields: Mapping[str, Any], name: str) -> tuple[float, ...]:
    """A list of positive numbers that float32 holds, empty where it is absent or null."""
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
    if isinstance(value, bool) or not isinstance(value, int | float) or not _LEAST <= value <= _MOST:
        raise ConfigError(
            f"config.json: {name} must be a positive number that float32 holds, not {reprlib.repr(value)}"
        )
    return float(value)


def _default[T](name: str, default: T | None) -> T:
    if default is None:
        raise ConfigError(f"config.json: {name} is missing; give the base model's configuration")
    return default
