"""Configuration of rotary embeddings: what a Hugging Face ``config.json`` says of them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flashsvd_jax.config_fields import flag, integer, number, numbers, optional_number
from flashsvd_jax.errors import ConfigError

ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: base frequency and the published scaling that stretches it.

    Attributes other than ``kind``, ``theta`` and ``partial`` belong to some kinds only; they carry the names of the Hugging Face
    fields. ``partial`` is the share of a head's columns, the first ones, that is rotated.
    """

    kind: str = "default"
    theta: float = 10000.0
    partial: float = 1.0
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], may_be_partial: bool = False) -> "RopeConfig":
        """Reads ``rope_parameters`` (transformers 5) or ``rope_theta`` with ``rope_scaling`` (before), which has the last word.

        ``may_be_partial`` says whether the base model's class heeds ``partial_rotary_factor``; an error where it does not.
        """
        raw = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
        if not isinstance(raw, Mapping) or any(isinstance(value, Mapping) for value in raw.values()):
            raise ConfigError(
                "config.json: rope_parameters must be one set of values; sets by layer type are not supported"
            )
        kind = raw.get("rope_type", raw.get("type", "default"))
        if kind not in ROPE_KINDS:
            raise ConfigError(f"config.json: rope scaling {kind!r} is not known; known: {', '.join(ROPE_KINDS)}")
        theta = number(raw, "rope_theta", number(hf, "rope_theta", 10000.0))
        if theta <= 1:
            raise ConfigError(f"config.json: rope_theta must be above 1, not {theta}")
        partial = number(raw, "partial_rotary_factor", number(hf, "partial_rotary_factor", 1.0))
        if partial > 1 or (partial < 1 and not may_be_partial):
            raise ConfigError(f"config.json: partial_rotary_factor {partial} is not supported; heads are rotated whole")
        return cls(theta=theta, partial=partial) if kind == "default" else cls._scaled(kind, theta, partial, raw, hf)

    @classmethod
    def _scaled(
        cls, kind: str, theta: float, partial: float, raw: Mapping[str, Any], hf: Mapping[str, Any]
    ) -> "RopeConfig":
        name = "original_max_position_embeddings"
        max_position = integer(hf, "max_position_embeddings")
        original = integer(hf, name, 0) or integer(raw, name, 0)
        if kind == "llama3" and not original:
            raise ConfigError(f"config.json: rope scaling 'llama3' needs {name}")
        if kind == "dynamic":  # stretches beyond the configured length, whatever the model was pretrained at
            original = max_position
        if raw.get("factor") is None and kind not in ("longrope", "yarn"):
            raise ConfigError(f"config.json: rope scaling {kind!r} needs a factor")
        rope = cls(
            kind=kind,
            theta=theta,
            partial=partial,
            factor=number(raw, "factor", max_position / original if original else 1.0),
            original_max_position=original or max_position,
            low_freq_factor=number(raw, "low_freq_factor", 1.0),
            high_freq_factor=number(raw, "high_freq_factor", 4.0),
            beta_fast=number(raw, "beta_fast", 32.0),
            beta_slow=number(raw, "beta_slow", 1.0),
            truncate=flag(raw, "truncate", True),
            attention_factor=optional_number(raw, "attention_factor"),
            mscale=optional_number(raw, "mscale"),
            mscale_all_dim=optional_number(raw, "mscale_all_dim"),
            short_factor=numbers(raw, "short_factor"),
            long_factor=numbers(raw, "long_factor"),
        )
        if kind == "longrope" and not (rope.short_factor and rope.long_factor and rope.original_max_position > 1):
            raise ConfigError(
                f"config.json: rope scaling 'longrope' needs short_factor and long_factor, and {name} above 1"
            )
        if rope.low_freq_factor >= rope.high_freq_factor:
            raise ConfigError("config.json: rope low_freq_factor must be below high_freq_factor")
        return rope

    def columns(self, head_dim: int) -> int:
        """How many of a head's columns are rotated."""
        return int(head_dim * self.partial)

    def check(self, head_dim: int) -> None:
        """Raises ConfigError for heads that cannot be rotated, and for factors that are not one for each pair of columns."""
        columns = self.columns(head_dim)
        if columns % 2 or columns < (4 if self.kind == "dynamic" else 2):
            part = "" if self.partial == 1 else f", of which {columns} columns are rotated,"
            raise ConfigError(f"config.json: head_dim {head_dim}{part} is odd or too small to be rotated")
        for name in ("short_factor", "long_factor"):
            values = getattr(self, name)
            if values and len(values) != columns // 2:
                raise ConfigError(f"config.json: rope {name} has {len(values)} entries, head_dim needs {columns // 2}")
