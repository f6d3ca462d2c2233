"""A checkpoint split over several files by a Hugging Face index, as one TensorSource."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from converters.sources.base import TensorInfo, TensorSource
from flashsvd_jax.checkpoint.json_files import unique
from flashsvd_jax.errors import CheckpointError

_MAX_NAMED = 10


class ShardedSource(TensorSource):
    """The shards that an index names; each tensor is in exactly the shard that the index says."""

    def __init__(self, index: Path, weight_map: Mapping[str, str], shards: Mapping[str, TensorSource]):
        """Join the opened `shards`, keyed by file name.

        Raises CheckpointError if the index and the shards do not hold the same tensors.
        """
        self.path = index.parent
        self.files = tuple(file for shard in shards.values() for file in shard.files)
        self.unknown_globals = tuple(sorted({name for shard in shards.values() for name in shard.unknown_globals}))
        self._shards = shards
        self._weight_map = weight_map
        missing = [f"{name} ({shard})" for name, shard in weight_map.items() if name not in shards[shard].infos()]
        if missing:
            raise CheckpointError(f"{index} names tensors that their shards do not hold: {_listing(missing)}")
        for name, shard in shards.items():
            extra = [tensor for tensor in shard.infos() if weight_map.get(tensor) != name]
            if extra:
                raise CheckpointError(
                    f"{shard.path} holds tensors that {index.name} does not name or places in another shard: "
                    f"{_listing(extra)}"
                )
        self._infos = {name: info for shard in shards.values() for name, info in shard.infos().items()}

    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def get(self, name: str) -> np.ndarray:
        if name not in self._weight_map:
            raise CheckpointError(f"{self.path} has no tensor {name}")
        return self._shards[self._weight_map[name]].get(name)

    def close(self) -> None:
        for shard in self._shards.values():
            shard.close()


def read_index(index: Path) -> dict[str, str]:
    """The `weight_map` of an index: the shard file of each tensor; all shards exist, beside the index.

    Raises CheckpointError for an index that is not one, names files outside its folder, or lacks shards.
    """
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=unique)["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{index} is not an index of a sharded checkpoint: {error!r}") from error
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index} is not an index of a sharded checkpoint: its weight_map names no files")
    shards = dict.fromkeys(weight_map.values())
    # A link beside the index may point anywhere, as download caches do; a name may not.
    outside = [name for name in shards if "\\" in name or name == ".." or Path(name).name != name]
    if outside:
        raise CheckpointError(f"{index} names files outside its folder: {_listing(outside)}")
    missing = [name for name in shards if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(f"{index.parent} lacks {_listing(missing)}: the download was interrupted? Run it again")
    return weight_map


def _listing(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more
