"""Finding the weights in what the user names: a file, or a folder as Hugging Face lays it out."""

import fnmatch
from pathlib import Path

from converters.sources.base import TensorSource
from converters.sources.remapped_source import CODES_FILE, RemappedSource
from converters.sources.safetensors_source import SafetensorsSource
from converters.sources.sharded_source import ShardedSource, read_index
from converters.sources.torch_source import TorchSource
from flashsvd_jax.errors import CheckpointError

_READERS = {".safetensors": SafetensorsSource, ".pt": TorchSource, ".pth": TorchSource, ".bin": TorchSource}
# Safetensors first: where a folder holds both formats they hold the same weights.
_STANDARD_NAMES = ("model.safetensors", "pytorch_model.bin")
# Files that training leaves beside the weights, and factors that mean nothing without the rest of their model.
_NOT_WEIGHTS = (
    "training_args.*",
    "optimizer.*",
    "scheduler.*",
    "rng_state*",
    "scaler.*",
    "adapter_model.*",
    CODES_FILE,
)
_MAX_LISTED = 20


def open_source(path: str | Path) -> TensorSource:
    """Open a checkpoint for reading: one `.safetensors`, `.pt`, `.pth` or `.bin` file, or a folder.

    A folder holds an index with its shards, `model.safetensors`, `pytorch_model.bin`, or else exactly one weight file;
    safetensors are preferred. Raises CheckpointError if there are no weights, several candidates, or damaged ones.
    """
    path = Path(path)
    if path.name == CODES_FILE and path.is_file():
        path = path.parent  # it holds a part of the model alone
    if path.is_dir():
        source = _open_folder(path)
        codes = path / CODES_FILE
        return RemappedSource(source, TorchSource(codes)) if codes.exists() else source
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    return _open_file(path)


def _open_file(path: Path) -> TensorSource:
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise CheckpointError(f"{path} is not a weight file: its name ends in none of {', '.join(_READERS)}")
    return reader(path)


def _open_folder(folder: Path) -> TensorSource:
    for name in _STANDARD_NAMES:
        single, index = folder / name, folder / f"{name}.index.json"
        if single.exists() and index.exists():
            raise CheckpointError(f"{folder} holds both {single.name} and {index.name}: remove the one that is stale")
        if index.exists():
            return _open_sharded(index)
        if single.exists():
            return _at_path(_open_file(single), folder)
    for suffixes in ((".safetensors",), (".pt", ".pth", ".bin")):
        found = [file for file in sorted(folder.iterdir()) if file.suffix in suffixes and _may_hold_weights(file)]
        if len(found) > 1:
            names = ", ".join(file.name for file in found[:_MAX_LISTED])
            raise CheckpointError(f"{folder} holds several weight files and no index: name one of {names}")
        if found:
            return _at_path(_open_file(found[0]), folder)
    names = sorted(file.name for file in folder.iterdir())
    listing = ", ".join(names[:_MAX_LISTED]) + (", ..." if len(names) > _MAX_LISTED else "") or "nothing"
    raise CheckpointError(f"{folder} holds no weight file; it holds {listing}")


def has_weights(folder: Path) -> bool:
    """Whether a folder holds a file that may be a model's weights."""
    return any(file.suffix in _READERS and _may_hold_weights(file) for file in folder.iterdir())


def _may_hold_weights(file: Path) -> bool:
    return not any(fnmatch.fnmatch(file.name, pattern) for pattern in _NOT_WEIGHTS)


def _open_sharded(index: Path) -> TensorSource:
    weight_map = read_index(index)
    shards = {name: _open_file(index.parent / name) for name in dict.fromkeys(weight_map.values())}
    return ShardedSource(index, weight_map, shards)


def _at_path(source: TensorSource, path: Path) -> TensorSource:
    source.path = path
    return source
