"""The configuration and manifest that stand beside a model's arrays, and what they say about these."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashsvd_jax.any_config import AnyConfig, config_from_hf
from flashsvd_jax.checkpoint.json_files import read_object
from flashsvd_jax.checkpoint.layout import CONFIG_FILE, MANIFEST_FILE
from flashsvd_jax.checkpoint.manifest import Manifest
from flashsvd_jax.errors import CheckpointError, ConfigError
from flashsvd_jax.schema import ParamSpec, count_params, schema


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What a model's folder says about its arrays.

    Attributes:
      hf_config: the base model's configuration, as its file has it.
      manifest: the content of the manifest file.
      config: the model that both describe.
      stored: name -> shape of every array that is stored, aliases left out.
    """

    hf_config: dict[str, Any]
    manifest: Manifest
    config: AnyConfig
    stored: dict[str, ParamSpec]

    @classmethod
    def of(cls, hf_config: Mapping[str, Any], manifest: Manifest, where: str) -> "Metadata":
        """Brings a configuration and a manifest together; ``where`` names their folder in messages.

        Raises:
          ConfigError: the configuration is not one that this package runs.
          CheckpointError: the manifest does not fit the configuration.
        """
        try:
            config = config_from_hf(hf_config, manifest.factorization)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
        except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise ConfigError(f"{where}: {CONFIG_FILE} has a field of the wrong kind: {error}") from error
        return cls(dict(hf_config), manifest, config, _stored(config, manifest, f"{where}: {MANIFEST_FILE}"))

    @classmethod
    def read(cls, folder: Path) -> "Metadata":
        """Reads both files of a folder.

        Raises:
          ConfigError, CheckpointError: see `of`; also for a file that is missing, unreadable or malformed.
        """
        path = folder / MANIFEST_FILE
        if not path.is_file():
            raise CheckpointError(f"{folder} is not a factorized model: it has no {MANIFEST_FILE}; convert it first")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        return cls.of(read_object(folder / CONFIG_FILE, ConfigError), Manifest.from_json(text, str(path)), str(folder))

    def write_config(self, folder: Path) -> None:
        """Writes the configuration's file."""
        (folder / CONFIG_FILE).write_text(json.dumps(self.hf_config, indent=2) + "\n", encoding="utf-8")

    def write_manifest(self, folder: Path) -> None:
        """Writes the manifest's file; last of all, because a folder is a model as soon as it has one."""
        (folder / MANIFEST_FILE).write_text(self.manifest.to_json(), encoding="utf-8")


def _stored(config: AnyConfig, manifest: Manifest, where: str) -> dict[str, ParamSpec]:
    try:
        specs = schema(config)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error
    aliases = config.factorization.owner_by_name
    for name, owner in aliases.items():
        problem = _alias_problem(name, owner, specs, aliases)
        if problem:
            raise CheckpointError(f"{where}: {name} cannot share the array of {owner}: {problem}")
    for field, model in (("params", config), ("params_dense", config.dense())):
        stated, counted = getattr(manifest, field), count_params(model)
        if stated != counted:
            raise CheckpointError(f"{where}: {field} is {stated}, the configuration and the ranks make it {counted}")
    return {name: spec for name, spec in specs.items() if name not in aliases}


def _alias_problem(name: str, owner: str, specs: Mapping[str, ParamSpec], aliases: Mapping[str, str]) -> str | None:
    for array in (name, owner):
        if array not in specs:
            return f"the model has no array {array}"
    if owner in aliases:
        return f"{owner} is shared itself; name the array that is stored"
    if specs[name].shape != specs[owner].shape:
        return f"their shapes are {list(specs[name].shape)} and {list(specs[owner].shape)}"
    return None
