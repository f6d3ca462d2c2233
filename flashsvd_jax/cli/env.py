"""Print versions, device, caches and kernel implementations: what a bug report needs."""

import argparse
import importlib.metadata
import platform
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pallas_kernels import Op

PACKAGES = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "orbax-checkpoint", "safetensors",
            "transformers", "tokenizers", "numpy", "jax-triton", "triton", "lm-eval")  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options: none."""


def run(parsed: argparse.Namespace) -> None:
    """Runs the command."""
    import jax

    from flashsvd_jax import __version__
    from flashsvd_jax.compile_cache import enable_persistent_cache
    from pallas_kernels import ops

    directory = enable_persistent_cache()
    print(f"flashsvd_jax {__version__}, Python {platform.python_version()}, {platform.platform()}")
    print("packages:", ", ".join(f"{name} {version}" for name in PACKAGES if (version := _version(name))))
    for device in jax.devices():
        memory = (device.memory_stats() or {}).get("bytes_limit")
        size = f", {memory / 2**30:.1f} GiB for JAX" if memory else ""
        print(f"device: {device.device_kind} ({device.platform} {device.id}){size}")
    print(f"XLA client: {jax.devices()[0].client.platform_version.splitlines()[0]}")
    if directory is None:
        print("compiled executables: not kept (FLASHSVD_CACHE_DIR=off)")
    else:
        files = [f for f in directory.rglob("*") if f.is_file()] if directory.exists() else []
        size = sum(f.stat().st_size for f in files) / 2**20
        print(f"compiled executables and autotuning: {directory} ({len(files)} files, {size:.1f} MiB)")
    for name, op in ops().items():
        print(f"op {name}: {_implementations(op)}")


def _implementations(op: "Op") -> str:
    """In the order in which they are tried, each with the reason if it can serve no call here."""
    from pallas_kernels import target

    device = target()
    reasons = {i.name: i.unavailable(device) for i in op.implementations}
    return ", ".join(name if reason is None else f"{name} (not here: {reason})" for name, reason in reasons.items())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
