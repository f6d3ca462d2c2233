"""Settings of the whole suite: the CPU unless told otherwise, no network, exact float32 products, quick compilation."""

import os

# Read once, when the libraries are first imported. JAX_PLATFORMS=cuda in the environment runs the suite on a GPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["FLASHSVD_CACHE_DIR"] = "off"  # the user's own cache is none of the suite's business
# PyTorch's models are tiny here, and on a busy machine its threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import jax
import pytest

jax.config.update("jax_default_matmul_precision", "highest")
if os.environ["JAX_PLATFORMS"] == "cpu":
    # Compiling is most of the suite's time and its models are tiny. Only code generation is cut short: what is fused, copied
    # or updated in place is decided before it.
    jax.config.update("jax_disable_most_optimizations", True)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        pytest.skip("no GPU; run with JAX_PLATFORMS=cuda on a machine that has one")
