"""Puts the wheels that compile for an NVIDIA GPU without one into a folder, for tests/gates: `cuda_compiler.py FOLDER`.

JAX's CUDA plugin of the version of the installed jaxlib, ptxas and libdevice: 270 MB to download. The folder stays off the import
path, so the environment's JAX remains what it is. Nothing is done where they are there already or the environment's own JAX is a
CUDA 13 build. What goes wrong is said and is no failure: the tests that need them are skipped then, or fail in CI.
"""

import importlib.util
import platform
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

PLUGIN = "jax-cuda13-plugin"
MACHINES = ("x86_64", "aarch64")


def requirements(jaxlib: str) -> list[str]:
    """What to install beside a jaxlib of this version."""
    return [f"{PLUGIN}=={jaxlib}", f"jax-cuda13-pjrt=={jaxlib}", "nvidia-cuda-nvcc>=13,<14", "nvidia-nvvm>=13,<14"]


def install(folder: Path) -> str | None:
    """Makes the folder unless it is there in this version; returns the reason where that cannot be done."""
    jaxlib = metadata.version("jaxlib")
    if installed(folder) == jaxlib or importlib.util.find_spec("jax_cuda13_plugin") is not None:
        return None
    if platform.system() != "Linux" or platform.machine() not in MACHINES:
        return f"there are none for {platform.system()} on {platform.machine()}"
    print(f"Installing what compiles for NVIDIA GPUs into {folder}; 270 MB, once", flush=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        new = Path(scratch) / "wheels"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        run = subprocess.run([*pip, "--target", str(new), *requirements(jaxlib)], check=False)
        if run.returncode:
            return "pip could not install them"
        # Whole or not at all: a folder that an interrupted run left behind would pass for a complete one.
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
    return None


def installed(folder: Path) -> str | None:
    """The version of the plugin in a folder."""
    return next((d.version for d in metadata.distributions(name=PLUGIN, path=[str(folder)])), None)


if __name__ == "__main__":
    reason = install(Path(sys.argv[1]))
    if reason is not None:
        print(
            f"No wheels that compile for NVIDIA GPUs: {reason}. The tests that need them will be skipped.",
            file=sys.stderr,
        )
