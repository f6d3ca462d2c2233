"""A factorized model as an Orbax checkpoint, for those who go on in the Flax ecosystem.

A folder with the arrays under ``params``, and the configuration and the manifest beside it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from flashsvd_jax.any_config import AnyConfig
from flashsvd_jax.checkpoint.manifest import Manifest
from flashsvd_jax.checkpoint.metadata import Metadata
from flashsvd_jax.checkpoint.params_tree import full_tree, stored_arrays
from flashsvd_jax.checkpoint.staging import StagedFolder, unwritable_as_checkpoint_error
from flashsvd_jax.errors import CheckpointError
from flashsvd_jax.schema import abstract_params, flatten, nest

_PARAMS_FOLDER = "params"


def save_orbax(dst: str | Path, params: Mapping[str, Any], hf_config: Mapping[str, Any], manifest: Manifest) -> None:
    """Writes a parameter tree ``{"params": ...}``, each shared array once, as a new folder: whole or not at all.

    Raises:
      ConfigError: the configuration is not one that this package runs.
      CheckpointError: ``dst`` exists or cannot be written, or the tree is not the model that ``hf_config`` and
        ``manifest`` describe, dtype included.
    """
    dst = Path(dst)
    metadata = Metadata.of(hf_config, manifest, str(dst))
    stored = stored_arrays(params, metadata.config, str(dst))
    wrong = sorted(name for name, array in stored.items() if array.dtype != jnp.dtype(manifest.dtype))
    if wrong:
        raise CheckpointError(f"{dst}: the manifest says {manifest.dtype}, cast these first: {', '.join(wrong)}")
    with StagedFolder(dst) as staged:
        with unwritable_as_checkpoint_error(dst, ValueError):  # TensorStore raises it for a full disk
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(staged.path / _PARAMS_FOLDER, nest(stored)["params"])
            metadata.write_config(staged.path)
            metadata.write_manifest(staged.path)
        staged.commit()


def load_orbax(path: str | Path) -> tuple[dict[str, Any], AnyConfig, dict[str, Any], Manifest]:
    """Reads what `save_orbax` wrote, onto the default device.

    Returns:
      The tree ``{"params": ...}`` with every shared array as one object, the configuration, the base model's
      configuration file, and the manifest.

    Raises:
      ConfigError: the configuration is not one that this package runs.
      CheckpointError: not such a folder, or a file is missing, damaged, or contradicts another.
    """
    path = Path(path)
    metadata = Metadata.read(path)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = flatten(abstract_params(metadata.config, jnp.dtype(metadata.manifest.dtype)))
    targets = {name: abstract[name].update(sharding=device) for name in metadata.stored}
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            stored = checkpointer.restore((path / _PARAMS_FOLDER).absolute(), nest(targets)["params"])
    except Exception as error:  # Orbax raises bare Exceptions among others for damaged files
        raise CheckpointError(f"{path / _PARAMS_FOLDER} cannot be read: {error}") from error
    params = full_tree(flatten({"params": stored}), metadata.config)
    return params, metadata.config, metadata.hf_config, metadata.manifest
