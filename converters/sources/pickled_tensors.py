"""What the tensors of a pickle turn into: references that say where the data lies, made without touching the data.

A pickle may call any object it was given and set attributes on it (BUILD). All that it is handed from here is therefore
a named tuple: immutable and without attributes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from flashsvd_jax.errors import CheckpointError

_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
_STORAGE_DTYPES = {
    "Double": "float64",
    "Float": "float32",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Bool": "bool",
    "Untyped": "uint8",
}
_PLAIN_TENSOR_TYPES = ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")


class DType(NamedTuple):
    """A torch dtype, e.g. `float16`."""

    name: str


class StorageType(NamedTuple):
    """A storage class of PyTorch by the dtype of its elements; an untyped storage counts bytes."""

    dtype: str


class StorageRef(NamedTuple):
    """The storage `key` of the archive: `numel` elements of `dtype`."""

    dtype: str
    key: str
    numel: int


class TensorRef(NamedTuple):
    """A tensor in a storage, not yet checked against a file; offset and stride are in elements of `dtype`.

    The stride is 0 wherever it does not matter: in dimensions of one element and in tensors without elements.
    """

    storage: StorageRef
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class UnsupportedTensor(NamedTuple):
    """A tensor of a kind that cannot be read: sparse, quantized, conjugated, a tensor subclass."""

    kind: str


class Call(NamedTuple):
    """A function of this package that a pickle may call."""

    function: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


def integers(values: Any) -> tuple[int, ...]:
    """`values` as a tuple. Raises CheckpointError unless it is a sequence of non-negative integers."""
    if type(values) not in (tuple, list):
        raise CheckpointError("a shape or stride in data.pkl is not a tuple")
    return tuple(_integer(value) for value in values)


def storage_ref(pid: Any) -> StorageRef:
    """The storage that a persistent id names. Raises CheckpointError for any other kind of persistent id."""
    if type(pid) is not tuple or len(pid) != 5 or pid[0] != "storage":
        raise CheckpointError("data.pkl refers to something that is not a storage")
    _, storage_type, key, _, numel = pid
    if type(key) is not str or "/" in key or "\\" in key or ".." in key:
        raise CheckpointError(f"data.pkl refers to a storage by the key {key!r}")
    return StorageRef(_dtype_name(storage_type), key, _integer(numel))


def unsupported_call(dotted_name: str) -> Call:
    """A stand-in for a rebuild function of PyTorch that is not known here."""
    return Call(lambda *_: UnsupportedTensor(dotted_name))


def tensor_globals() -> dict[tuple[str, str], Any]:
    """What the names (module, name) that make up a tensor resolve to."""
    known: dict[tuple[str, str], Any] = {
        ("torch._utils", "_rebuild_tensor_v2"): Call(_rebuild_tensor_v2),
        ("torch._utils", "_rebuild_tensor_v3"): Call(_rebuild_tensor_v3),
        ("torch._utils", "_rebuild_parameter"): Call(_rebuild_parameter),
        ("torch._utils", "_rebuild_parameter_with_state"): Call(_rebuild_parameter),
        ("torch._tensor", "_rebuild_from_type_v2"): Call(_rebuild_from_type_v2),
    }
    for name, dtype in _STORAGE_DTYPES.items():
        for module in ("torch", "torch.storage"):
            known[module, f"{name}Storage"] = StorageType(dtype)
    return known | {("torch", name): DType(name) for name in _DTYPES}


def _integer(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise CheckpointError("a size, stride or offset in data.pkl is not a non-negative integer")
    return value


def _dtype_name(value: Any) -> str:
    """The name of a dtype or storage type; a stand-in class goes by its own name and is refused when it is used."""
    if isinstance(value, DType | StorageType):
        return value[0]
    return value.dotted_name


def _rebuild_tensor_v2(
    storage: Any, offset: Any, shape: Any, stride: Any, requires_grad: Any, hooks: Any, metadata: Any = None
) -> TensorRef | UnsupportedTensor:
    if metadata:
        return UnsupportedTensor("conjugated or negated view")
    if not isinstance(storage, StorageRef):
        raise CheckpointError("a tensor in data.pkl has no storage")
    shape, stride = integers(shape), integers(stride)
    if len(shape) != len(stride):
        raise CheckpointError(f"a tensor in data.pkl has shape {shape} but stride {stride}")
    stride = tuple(step if size > 1 and 0 not in shape else 0 for size, step in zip(shape, stride, strict=True))
    return TensorRef(storage, storage.dtype, _integer(offset), shape, stride)


def _rebuild_tensor_v3(
    storage: Any, offset: Any, shape: Any, stride: Any, requires_grad: Any, hooks: Any, dtype: Any, metadata: Any = None
) -> TensorRef | UnsupportedTensor:
    tensor = _rebuild_tensor_v2(storage, offset, shape, stride, requires_grad, hooks, metadata)
    return tensor._replace(dtype=_dtype_name(dtype)) if isinstance(tensor, TensorRef) else tensor


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


def _rebuild_from_type_v2(function: Any, tensor_type: Any, args: Any, state: Any) -> Any:
    """A tensor of a subclass, or one with attributes of its own, as every `torch.nn.Buffer` is."""
    if tensor_type.dotted_name in _PLAIN_TENSOR_TYPES and isinstance(function, Call):
        return function(*args)
    return UnsupportedTensor(tensor_type.dotted_name)
