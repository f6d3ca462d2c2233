"""Where the wheels are that compile for an NVIDIA GPU without one: JAX's CUDA plugin, ptxas and libdevice.

`make test` puts them into .venv/cuda-compiler; FLASHSVD_CUDA_COMPILER names another folder; an environment whose own JAX is the
CUDA 13 build needs no folder.
"""

import dataclasses
import importlib.util
import os
import sys
from importlib import metadata
from pathlib import Path

import pytest

FOLDER_VARIABLE = "FLASHSVD_CUDA_COMPILER"
REQUIRED_VARIABLE = "FLASHSVD_REQUIRE_CUDA_COMPILER"
PLUGIN = "jax-cuda13-plugin"


@dataclasses.dataclass(frozen=True)
class Toolchain:
    """``path`` is what a process needs in front of its import path; ``cuda`` holds bin/ptxas and nvvm/libdevice."""

    path: tuple[str, ...]
    cuda: Path

    @property
    def ptxas(self) -> Path:
        return self.cuda / "bin" / "ptxas"


def find_toolchain() -> Toolchain | str:
    """The wheels, or the reason why nothing can be compiled for an NVIDIA GPU here."""
    named = os.environ.get(FOLDER_VARIABLE)
    folder = Path(named) if named else Path(sys.prefix) / "cuda-compiler"
    if named or folder.is_dir():
        path = (str(folder.resolve()),)
    elif importlib.util.find_spec("jax_cuda13_plugin") is not None:
        path = ()
    else:
        return f"no wheels that compile for CUDA: neither {folder} (`make test` makes it) nor {PLUGIN} is there"
    version = _plugin_version(path)
    wanted = metadata.version("jaxlib")
    if version != wanted:
        found = f"{PLUGIN} {version}" if version else f"no {PLUGIN}"
        return f"{found} in {folder if path else 'the environment'}, where jaxlib is {wanted}"
    for entry in path or sys.path:
        cuda = Path(entry) / "nvidia" / "cu13"
        if (cuda / "bin" / "ptxas").is_file() and (cuda / "nvvm" / "libdevice").is_dir():
            return Toolchain(path, cuda)
    return f"{PLUGIN} is there, but nvidia-cuda-nvcc (ptxas) or nvidia-nvvm (libdevice) is not"


def require_toolchain() -> Toolchain:
    """The wheels. Without them the test is skipped, or fails where FLASHSVD_REQUIRE_CUDA_COMPILER is set, as in CI."""
    found = find_toolchain()
    if isinstance(found, Toolchain):
        return found
    if os.environ.get(REQUIRED_VARIABLE):
        pytest.fail(f"{found} ({REQUIRED_VARIABLE} is set)")
    pytest.skip(found)


def _plugin_version(path: tuple[str, ...]) -> str | None:
    found = metadata.distributions(name=PLUGIN, path=list(path or sys.path))
    return next((distribution.version for distribution in found), None)
