"""Turning an unpickled checkpoint into a flat state dict: a pickled module, a state dict, or a dict around either."""

from typing import Any

from converters.sources.pickled_tensors import TensorRef, UnsupportedTensor
from converters.sources.unpickle import Stub
from flashsvd_jax.errors import CheckpointError

_MAX_VALUES = 5_000_000

# Keys of the outermost dict: those around the model add nothing to tensor names, those beside it are not the model.
MODEL_KEYS = ("model", "state_dict", "model_state_dict")
_OPTIMIZER_KEYS = {"optimizer", "optimizer_state_dict", "optimizer_states", "scaler"}
_SCHEDULER_KEYS = {"scheduler", "lr_scheduler", "lr_scheduler_state_dict", "lr_schedulers"}
_PROGRESS_KEYS = {"epoch", "step", "loss", "val_loss", "rng_state", "cuda_rng_state"}
_NOT_MODEL_KEYS = {"tokenizer", "w_quantizers"} | _OPTIMIZER_KEYS | _SCHEDULER_KEYS | _PROGRESS_KEYS


def flatten(root: Any) -> dict[str, TensorRef]:
    """All tensors of an unpickled checkpoint by the names that `state_dict()` gives them.

    Raises CheckpointError for tensors of a kind that cannot be read and for two tensors of one name, RecursionError
    for objects that contain themselves.
    """
    collector = _Collector()
    if isinstance(root, dict):
        wrapped = {key: root[key] for key in MODEL_KEYS if isinstance(root.get(key), Stub | dict)}
        for model in wrapped.values():
            collector.add("", model)
        collector.add_items("", {key: root[key] for key in root if key not in wrapped and key not in _NOT_MODEL_KEYS})
    else:
        collector.add("", root)
    return collector.tensors


class _Collector:
    def __init__(self):
        self.tensors: dict[str, TensorRef] = {}
        self._values = 0

    def add(self, name: str, value: Any) -> None:
        """Collect the tensors of `value`; they are called `name`, or get it as a prefix."""
        self._values += 1
        if self._values > _MAX_VALUES:  # objects that share their parts can unfold to any number
            raise CheckpointError(f"data.pkl holds more than {_MAX_VALUES} values, more than a model ever needs")
        if isinstance(value, TensorRef):
            if self.tensors.setdefault(name, value) != value:
                raise CheckpointError(f"two different tensors are called {name}")
        elif isinstance(value, UnsupportedTensor):
            raise CheckpointError(f"tensor {name} is of a kind that cannot be read: {value.kind}")
        elif isinstance(value, Stub):
            self._add_module(name, value)
        elif isinstance(value, dict):
            self.add_items(name, value)
        elif type(value) in (list, tuple):
            self.add_items(name, dict(enumerate(value)))

    def add_items(self, name: str, items: dict[Any, Any]) -> None:
        """Collect the tensors of a dict, whose keys continue `name`."""
        for key, value in items.items():
            if type(key) in (str, int):
                self.add(f"{name}.{key}" if name else str(key), value)

    def _add_module(self, name: str, stub: Stub) -> None:
        attributes = stub.attributes()
        parameters, buffers, modules = (attributes.get(key) for key in ("_parameters", "_buffers", "_modules"))
        if not (isinstance(parameters, dict) and isinstance(buffers, dict) and isinstance(modules, dict)):
            return  # no torch.nn.Module: a tokenizer, a configuration, ...
        not_saved = attributes.get("_non_persistent_buffers_set", set())
        if not isinstance(not_saved, set):
            raise CheckpointError(f"module {name} does not say which of its buffers belong to the checkpoint")
        buffers = {key: value for key, value in buffers.items() if key not in not_saved}
        for value in (*parameters.values(), *buffers.values()):
            if isinstance(value, Stub):
                raise CheckpointError(f"module {name} holds a {value.dotted_name} in place of a tensor")
        for group in (parameters, buffers, modules):
            self.add_items(name, group)
