"""Tracing and lowering as if the default device were an H200, or another that this process compiles for."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import AbstractDevice, AbstractMesh, Sharding

from pallas_kernels.target import H200, Target, assume_target

_sharding: Sharding | None = None
_device = H200


def compile_for(device: Target, sharding: Sharding) -> None:
    """From now on, in a process that compiles, it is this device, and `on_device` puts shapes there."""
    global _sharding, _device
    _sharding, _device = sharding, device


@contextlib.contextmanager
def as_on_device() -> Iterator[None]:
    """Pallas finds the device that it lowers for, and the ops choose their kernels for it."""
    described = AbstractDevice(device_kind=_device.kind, num_cores=_device.cores, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=described)), assume_target(_device):
        yield


def on_device(tree: Any) -> Any:
    """The same tree with its shapes placed on the described device, or as it is where none is described."""
    place = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=_sharding)  # noqa: E731
    is_shape = lambda a: isinstance(a, jax.ShapeDtypeStruct)  # noqa: E731
    return jax.tree.map(lambda a: place(a) if is_shape(a) else a, tree)
