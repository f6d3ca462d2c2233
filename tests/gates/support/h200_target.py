"""Tracing and lowering as if the default device were an H200."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import AbstractDevice, AbstractMesh, Sharding

from pallas_kernels.target import H200, assume_target

_sharding: Sharding | None = None


def place_on(sharding: Sharding) -> None:
    """From now on `on_h200` puts shapes there: the described H200 of a process that compiles for it."""
    global _sharding
    _sharding = sharding


@contextlib.contextmanager
def as_on_h200() -> Iterator[None]:
    """Pallas finds the device that it lowers for, and the ops choose their kernels for it."""
    device = AbstractDevice(device_kind=H200.kind, num_cores=H200.cores, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)), assume_target(H200):
        yield


def on_h200(tree: Any) -> Any:
    """The same tree with its shapes placed on the described H200, or as it is where none is described."""
    place = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=_sharding)  # noqa: E731
    is_shape = lambda a: isinstance(a, jax.ShapeDtypeStruct)  # noqa: E731
    return jax.tree.map(lambda a: place(a) if is_shape(a) else a, tree)
