"""Unpickling without running anything: tensors become references, every other object an inert stand-in."""

import io
import pickle
from collections.abc import Callable
from typing import Any, ClassVar

from converters.sources.pickle_check import MAX_OPCODES, check_pickle
from converters.sources.pickled_tensors import Call, StorageRef, integers, storage_ref, tensor_globals, unsupported_call
from flashsvd_jax.errors import CheckpointError

_MAX_GLOBALS = 4096


class PickledDict(dict):
    """An OrderedDict of a pickle; attributes set on it (`_metadata` of a state dict) are dropped."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None: ...


class Stub:
    """Stands in for an object of a class that is not known here: keeps the state it was pickled with, does nothing.

    It has every method that unpickling may call on an object, whatever class the object had.
    """

    __slots__ = ("state",)
    dotted_name: ClassVar[str]
    state: object

    def __new__(cls, /, *args: object, **kwargs: object) -> "Stub":
        stub = super().__new__(cls)
        stub.state = None
        return stub

    def __init__(self, /, *args: object, **kwargs: object): ...

    def __call__(self, /, *args: object, **kwargs: object) -> "Stub":
        return self

    def __setstate__(self, state: object) -> None:
        self.state = state

    def append(self, item: object) -> None: ...

    def add(self, item: object) -> None: ...

    def __setitem__(self, key: object, value: object) -> None: ...

    def attributes(self) -> dict[Any, Any]:
        """The attributes the object was pickled with: its `__dict__` and its slots."""
        parts = self.state if type(self.state) is tuple else (self.state,)
        return {key: value for part in parts if isinstance(part, dict) for key, value in part.items()}


def load_inert(data: bytes) -> tuple[Any, tuple[str, ...]]:
    """Unpickle `data` without importing or executing anything it names.

    Returns the object tree and the sorted dotted names that were replaced by stand-ins.
    Raises CheckpointError for anything that is not a sound pickle as torch.save writes it.
    """
    try:
        check_pickle(data)
        unpickler = InertUnpickler(data)
        return unpickler.load(), unpickler.unknown_globals()
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can make the unpickler raise anything
        raise CheckpointError(f"data.pkl is damaged: {type(error).__name__}: {error}") from error


class InertUnpickler(pickle.Unpickler):
    """Resolves the few names that make up tensors and containers by itself, and all others to Stub classes."""

    def __init__(self, data: bytes):
        super().__init__(io.BytesIO(data))
        self._known = tensor_globals() | _container_globals()
        self._unknown: dict[tuple[str, str], type[Stub] | Call] = {}

    def unknown_globals(self) -> tuple[str, ...]:
        """Sorted dotted names of the globals that were asked for and are not known here."""
        return tuple(sorted(f"{module}.{name}" for module, name in self._unknown))

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """The stand-in for a global; never imports."""
        key = (module_name, global_name)
        if key in self._known:
            return self._known[key]
        if key not in self._unknown:
            if len(self._unknown) >= _MAX_GLOBALS:
                raise CheckpointError(f"data.pkl names more than {_MAX_GLOBALS} classes")
            self._unknown[key] = _stand_in(f"{module_name}.{global_name}")
        return self._unknown[key]

    def persistent_load(self, pid: Any, /) -> StorageRef:
        """A reference to a storage; its data stays in the file."""
        return storage_ref(pid)


def _stand_in(dotted_name: str) -> type[Stub] | Call:
    if dotted_name.startswith(("torch._utils._rebuild", "torch._tensor._rebuild")):
        return unsupported_call(dotted_name)
    return type("Stub", (Stub,), {"__slots__": (), "dotted_name": dotted_name})


def _container_globals() -> dict[tuple[str, str], Any]:
    copied = 0

    def container(kind: Callable[[Any], Any]) -> Call:
        def build(items: Any = ()) -> Any:
            if isinstance(items, Stub):
                return items
            # Each call copies its argument, and a pickle can name a long one again and again at no cost.
            nonlocal copied
            copied += len(items)
            if copied > MAX_OPCODES:
                raise CheckpointError("data.pkl copies its containers too often")
            return kind(items)

        return Call(build)

    known: dict[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): container(PickledDict),
        ("torch", "Size"): container(integers),
    }
    for kind in (set, frozenset, dict, list):
        for module in ("builtins", "__builtin__"):  # protocol 2 uses the names of Python 2
            known[module, kind.__name__] = container(kind)
    return known
