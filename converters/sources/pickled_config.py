"""The model configuration that a pickled Hugging Face model carries."""

import math
from typing import Any

from converters.sources.pickled_tensors import DType
from converters.sources.state_dict import MODEL_KEYS
from converters.sources.unpickle import Stub
from flashsvd_jax.errors import CheckpointError

_MAX_VALUES = 100_000
# `model_type` is an attribute of the class, so the pickle does not hold it.
_MODEL_TYPES = {
    "LlamaConfig": "llama",
    "MistralConfig": "mistral",
    "Qwen2Config": "qwen2",
    "Qwen3Config": "qwen3",
    "OPTConfig": "opt",
}


def embedded_config(root: Any) -> dict[str, Any] | None:
    """The plain entries of the configuration in an unpickled checkpoint, None if there is none.

    Numbers, strings, None, and lists and dicts of them are kept, dtypes by name; private entries and all other objects
    are dropped. `model_type` is added from the class of the configuration where that is known.
    Raises CheckpointError for a configuration out of all proportion, RecursionError for one that contains itself.
    """
    candidates = [root.get(key) for key in MODEL_KEYS] if isinstance(root, dict) else [root]
    for model in candidates:
        config = model.attributes().get("config") if isinstance(model, Stub) else None
        if isinstance(config, Stub):
            model_type = _MODEL_TYPES.get(config.dotted_name.rpartition(".")[2])
            return ({"model_type": model_type} if model_type else {}) | _PlainCopy().copy_dict(config.attributes())
    return None


class _NotPlain(Exception):
    """A value that JSON cannot hold."""


class _PlainCopy:
    def __init__(self):
        self._values = 0

    def copy_dict(self, entries: dict[Any, Any]) -> dict[str, Any]:
        plain: dict[str, Any] = {}
        for key, value in entries.items():
            if type(key) is int or (type(key) is str and not key.startswith("_")):
                try:
                    plain[str(key)] = self._copy(value)
                except _NotPlain:
                    continue
        return plain

    def _copy(self, value: Any) -> Any:
        self._values += 1
        if self._values > _MAX_VALUES:  # lists that share their parts can unfold to any number
            raise CheckpointError(f"the pickled configuration has more than {_MAX_VALUES} entries")
        if isinstance(value, DType):
            return value.name
        if value is None or type(value) in (str, bool, int) or (type(value) is float and math.isfinite(value)):
            return value
        if isinstance(value, list | tuple):
            return [self._copy(item) for item in value]
        if isinstance(value, dict):
            return self.copy_dict(value)
        raise _NotPlain
