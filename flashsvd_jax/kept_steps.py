"""Compiled steps kept across processes whole, so that a later process need not trace and lower them, seconds of Python for a model.

JAX's own cache knows an executable by the program that was lowered. Here a step is known by all that decides what would be lowered:
what it is made of, its arguments' shapes, the code of this project, versions, settings and the device. A file is

    SHA-256 of what follows | pickle of `KeptStep`, of which the executable is the largest part

in the folder of JAX's cache, and is trusted as that is: both hold programs that are run.
"""

import contextlib
import dataclasses
import functools
import hashlib
import logging
import os
import pickle
import platform
import tempfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable

import pallas_kernels
from flashsvd_jax.compile_cache import is_kept
from pallas_kernels import Implementation, ops, target
from pallas_kernels.registry import Record

_log = logging.getLogger(__name__)
_FOLDER = "steps"
_DIGEST = hashlib.sha256().digest_size
_ENVIRONMENT = ("XLA_", "CUBLAS", "CUDNN", "NVIDIA_", "TF_")
_LIBRARIES = (
    "jaxlib", "jax-cuda12-pjrt", "jax-cuda13-pjrt", "nvidia-cublas-cu12", "nvidia-cublas", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13",
)  # fmt: skip
"""What an executable was made with, and calls: it names algorithms as they number them."""


@dataclasses.dataclass(frozen=True)
class KeptStep:
    """What a file holds.

    Attributes:
      executable: serialized.
      trees: the structures of its arguments and of what it gives.
      gives: the shapes of that.
      used: the choices of kernels that were made as it was traced.
    """

    executable: bytes
    trees: tuple[Any, Any]
    gives: Any
    used: Record

    def load(self) -> Any:
        """The compiled step, on the default device."""
        return serialize_executable.deserialize_and_load(
            self.executable, *self.trees, execution_devices=[jax.devices()[0]]
        )


def file_of(made_of: str, arguments: Iterable[Any]) -> Path | None:
    """Where a step is kept for arguments of such shapes; None if nothing is to be kept.

    Args:
      made_of: what the step is made of.
      arguments: trees of arrays or of their shapes.
    """
    if not is_kept() or (code := _code()) is None or not all(map(_is_ours, _implementations())):
        return None
    leaves, tree = jax.tree.flatten(tuple(arguments))
    placed = {device for leaf in leaves for device in getattr(getattr(leaf, "sharding", None), "device_set", ())}
    if not placed <= {jax.devices()[0]}:
        return None
    described = [made_of, str(tree), *map(_described, leaves), code, _surroundings()]
    name = hashlib.sha256("\n".join(described).encode()).hexdigest()
    return Path(jax.config.jax_compilation_cache_dir) / _FOLDER / name


def read(file: Path) -> KeptStep | None:
    """What a file holds; None if there is none, or it is not what was written."""
    try:
        content = file.read_bytes()
    except OSError:
        return None
    try:
        if hashlib.sha256(content[_DIGEST:]).digest() != content[:_DIGEST]:
            raise ValueError("it is damaged")
        return pickle.loads(content[_DIGEST:])
    except Exception as error:  # whatever unpickling raises
        forget(file, error)
        return None


def forget(file: Path, error: Exception) -> None:
    """Removes a file that cannot be used, and says so."""
    _log.warning("a kept step is of no use and compiled again: %s: %s: %s", file, type(error).__name__, error)
    with contextlib.suppress(OSError):
        file.unlink()


def write(file: Path, compiled: Any, gives: Any, used: Record) -> None:
    """Keeps a compiled step; where that fails a warning says why, once, and nothing is left behind."""
    try:
        executable, takes, given = serialize_executable.serialize(compiled)
        shapes = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=getattr(a, "weak_type", False)), gives
        )
        content = pickle.dumps(KeptStep(executable, (takes, given), shapes, used))
        file.parent.mkdir(parents=True, exist_ok=True)
        _replace(file, hashlib.sha256(content).digest() + content)
    except Exception as error:  # a step that cannot be kept can still be run
        _warn_once(f"compiled steps are not kept in {file.parent}: {type(error).__name__}: {error}")


@functools.cache
def _warn_once(message: str) -> None:
    _log.warning("%s", message)


def _replace(file: Path, content: bytes) -> None:
    """Writes a file at once, whoever else writes it."""
    handle, part = tempfile.mkstemp(".part", ".", file.parent)
    try:
        with os.fdopen(handle, "wb") as opened:
            opened.write(content)
        os.replace(part, file)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def _described(leaf: Any) -> str:
    return f"{leaf.dtype}{leaf.shape}{'weak' if getattr(leaf, 'weak_type', False) else ''}"


def _implementations() -> list[Implementation]:
    return [implementation for op in ops().values() for implementation in op.implementations]


def _is_ours(implementation: Implementation) -> bool:
    """Whether its code is this project's: of others' nobody knows when it changes."""
    run = implementation.run
    while isinstance(run, functools.partial):
        run = run.func
    return run.__module__.partition(".")[0] in (pallas_kernels.__name__, __name__.partition(".")[0])


@functools.cache
def _code() -> str | None:
    """A digest of this project's code and tables as they are on disk; None if they are not there as files."""
    digest = hashlib.sha256()
    for package in (Path(__file__).parent, Path(pallas_kernels.__file__).parent):
        if not package.is_dir():
            return None
        for file in sorted(f for kind in ("*.py", "*.json") for f in package.rglob(kind)):
            digest.update(f"{file.relative_to(package)}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def _surroundings() -> str:
    """What else decides: versions, the device, which kernels it has, and settings."""
    device, here = jax.devices()[0], target()
    host = _instructions() if device.platform == "cpu" else ""
    settings = {name: getattr(jax.config, name, value) for name, value in jax.config.values.items()}
    parts = [
        jax.__version__, _libraries(), device.device_kind, device.client.platform_version, host, here,
        [(i.name, i.unavailable(here)) for i in _implementations()],
        sorted((name, repr(value)) for name, value in settings.items() if "cache" not in name),
        sorted((name, value) for name, value in os.environ.items() if name.startswith(_ENVIRONMENT)),
    ]  # fmt: skip
    return "\n".join(map(repr, parts))


@functools.cache
def _libraries() -> list[str]:
    found = []
    for name in _LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{name} {metadata.version(name)}")
    return found


@functools.cache
def _instructions() -> str:
    """What this machine's processor can do: code that was compiled on another one may not run."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
