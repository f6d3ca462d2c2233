"""The device that kernels are chosen for: the default one, or one that is only assumed, to compile for it or to interpret."""

import contextlib
import dataclasses
from collections.abc import Iterator
from contextvars import ContextVar

import jax

_ASSUMED: ContextVar["Target | None"] = ContextVar("assumed target", default=None)


@dataclasses.dataclass(frozen=True)
class Target:
    """A device as kernels see it.

    Attributes:
      platform: "cuda", "cpu", or what else JAX calls it.
      kind: the device's name, such as "NVIDIA H200"; tuning tables are looked up by it.
      capability: CUDA compute capability, (0, 0) elsewhere.
      cores: streaming multiprocessors.
      interpret: kernels are run by Pallas' interpreter, which needs no GPU.
    """

    platform: str
    kind: str = ""
    capability: tuple[int, int] = (0, 0)
    cores: int = 1
    interpret: bool = False

    @property
    def shared_memory(self) -> int:
        """Bytes that a block may use: 99 KiB on consumer chips, more on those for data centres."""
        return {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227}.get(self.capability, 99) * 1024


H200 = Target("cuda", "NVIDIA H200", (9, 0), 132)


def target() -> Target:
    """What to choose kernels for now."""
    assumed = _ASSUMED.get()
    if assumed is not None:
        return assumed
    device = jax.config.jax_default_device or jax.devices()[0]
    if isinstance(device, str) or device.platform != "gpu" or not hasattr(device, "compute_capability"):
        return Target(device if isinstance(device, str) else device.platform)
    major, _, minor = str(device.compute_capability).partition(".")
    if not minor:  # gfx942 and the like: not NVIDIA
        return Target("rocm", device.device_kind)
    return Target("cuda", device.device_kind, (int(major), int(minor)), device.core_count)


@contextlib.contextmanager
def setting[T](variable: ContextVar[T], value: T) -> Iterator[None]:
    """Gives a context variable a value for a while."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def assume_target(assumed: Target) -> contextlib.AbstractContextManager[None]:
    """Chooses kernels for a device that need not be there, while a function is traced."""
    return setting(_ASSUMED, assumed)


def is_assumed() -> bool:
    """Whether `target` is not the device that runs things here."""
    return _ASSUMED.get() is not None


def not_nvidia(device: Target) -> str | None:
    """Why kernels for NVIDIA GPUs cannot run on a device, or None."""
    return None if device.platform == "cuda" else f"written for NVIDIA GPUs, not {device.platform}"
