"""What is known of a family of checkpoints, and how to recognise it by that."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from converters.rules import PairRule
from converters.sources import TensorSource, WrappedSource
from flashsvd_jax.any_config import AnyConfig


@dataclass(frozen=True)
class Family:
    """One way of storing a compressed model. What is left empty is no part of the evidence.

    Attributes:
      name: short name, kept in the converted model's metadata.
      description: one line for listings.
      pairs: names of the factors; a site is read by the first rule that finds one of its tensors.
      config_keys: keys of config.json, any of which is evidence.
      model_types: the family's own ``model_type`` values, any of which is evidence, and the base architecture of each.
      architectures: beginnings of class names in ``architectures``, any of which is evidence.
      config_values: entries that, where present, must have this value.
      key_pattern: regular expression for tensor names, where no pairs or not their names alone are evidence; with it,
        none is needed in the configuration.
      files: files in the folder that tell the family.
      rank_map: key of config.json that maps module names to ranks.
      added_keys: further keys that it adds to config.json; they are no evidence.
      prefix: what the tensor names may begin with in addition.
      names: "binding": factors whose shapes fit only the other way round are an error; "hint": the shapes decide, and
        the names where the shapes cannot; "none": the shapes decide alone.
      fixed_rope: its own model code rotates positions with base 10000 and no scaling, whatever the configuration says.
      view: the checkpoint, the configuration that came with it, and the base model -> a source of the names and layouts that
        ``pairs`` mean, where they are others than the checkpoint's own.
      refusal: why the family is recognised and not read.
    """

    name: str
    description: str
    pairs: tuple[PairRule, ...] = ()
    config_keys: tuple[str, ...] = ()
    model_types: tuple[tuple[str, str], ...] = ()
    architectures: tuple[str, ...] = ()
    config_values: tuple[tuple[str, Any], ...] = ()
    key_pattern: str = ""
    files: tuple[str, ...] = ()
    rank_map: str = ""
    added_keys: tuple[str, ...] = ()
    prefix: str = ""
    names: Literal["binding", "hint", "none"] = "binding"
    fixed_rope: bool = False
    view: Callable[[TensorSource, Mapping[str, Any], AnyConfig], WrappedSource] | None = None
    refusal: str = ""

    def bare(self, name: str) -> str:
        """A tensor's name without the family's prefix."""
        return name.removeprefix(self.prefix)

    def evidence(self, config: Mapping[str, Any], names: Iterable[str]) -> list[str] | None:
        """What speaks for this family, one phrase each; None where something that it needs is absent."""
        said, stored = self.claims(config), self._in_names(names)
        needs_config = bool(self.config_keys or self.model_types or self.architectures) and not self.key_pattern
        needs_names = bool(self.pairs or self.key_pattern)
        needs_file = bool(self.files) and not (needs_config or needs_names)
        if needs_file or (needs_config and not said) or (needs_names and not stored):
            return None
        return said + stored

    def claims(self, config: Mapping[str, Any]) -> list[str]:
        """What a configuration says for this family."""
        found = [f"config.json has {key}" for key in self.config_keys if config.get(key) not in (None, {}, [])]
        if str(config.get("model_type")) in dict(self.model_types):
            found.append(f"config.json says model_type {config['model_type']}")
        classes = [name for name in architectures(config) if name.startswith(self.architectures)]
        return found + [f"config.json says architecture {name}" for name in classes]

    def _in_names(self, names: Iterable[str]) -> list[str]:
        for name in names:
            if self.key_pattern:
                found = re.search(self.key_pattern, name) is not None
            else:
                found = any(rule.matches(self.bare(name)) for rule in self.pairs)
            if found:
                return [f"tensor {name}"]
        return []


def architectures(config: Mapping[str, Any]) -> list[str]:
    """The class names in a configuration, which nobody has checked; none where there is no list of them."""
    names = config.get("architectures")
    return [str(name) for name in names] if isinstance(names, list | tuple) else []
