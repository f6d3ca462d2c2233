"""Prints the extra of flashsvd-jax that installs JAX for this machine: cpu, cuda12 or cuda13."""

import shutil
import subprocess
import sys

# What JAX's CUDA builds need, newest first: the extra, the driver's major version, the GPU's compute capability.
BUILDS = (("cuda13", 580, 7.5), ("cuda12", 525, 5.2))
QUERY = ("nvidia-smi", "--query-gpu=driver_version,compute_cap", "--format=csv,noheader")


def jax_extra() -> str:
    """The newest CUDA build that the driver and every GPU can run; `cpu`, and the reason on stderr, if none."""
    if shutil.which(QUERY[0]) is None:
        return "cpu"
    answer = subprocess.run(QUERY, capture_output=True, text=True, check=False)
    gpus = [line.split(",") for line in answer.stdout.splitlines()]
    try:
        driver = min(int(version.split(".")[0]) for version, _ in gpus)
        capability = min(float(capability) for _, capability in gpus)
    except ValueError:
        return _fall_back(f"nvidia-smi reports no usable GPU ({(answer.stdout + answer.stderr).strip()})")
    for extra, oldest_driver, oldest_capability in BUILDS:
        if driver >= oldest_driver and capability >= oldest_capability:
            return extra
    _, oldest_driver, oldest_capability = BUILDS[-1]
    return _fall_back(
        f"JAX needs NVIDIA driver >= {oldest_driver} and compute capability >= {oldest_capability}, "
        f"this machine has {driver} and {capability}"
    )


def _fall_back(reason: str) -> str:
    print(f"{reason}: installing JAX for CPU", file=sys.stderr)
    return "cpu"


if __name__ == "__main__":
    print(jax_extra())
