"""Steps of the bundled model in the persistent kernel, for compute-sanitizer.

`compute-sanitizer --tool memcheck python tests/gpu/sanitized_steps.py`, with the tool of CUDA 13.5 and the repository installed or
on PYTHONPATH. Without CUDA graphs: a graph keeps a kernel's parameters, of which one reads its own, where the tool knows no memory.
"""

import os
import tempfile
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_gpu_enable_command_buffer= --xla_gpu_autotune_level=0"
os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"

from converters import convert
from flashsvd_jax import SamplingParams, decode_loop, generate, load
from flashsvd_jax.bundled import COMPRESSED, DENSE


def main() -> None:
    """Converts the model, generates a few tokens and prints them."""
    decode_loop.loop_options = lambda: None  # which would make a graph of the loop
    with tempfile.TemporaryDirectory() as folder:
        convert(COMPRESSED, Path(folder) / "model", base=DENSE, progress=False)
        model = load(Path(folder) / "model", kernels="persistent", max_length=128, dtype="bfloat16")
        print(generate(model, "def main(", SamplingParams(temperature=0.0, max_tokens=24)))
    assert set(model.engine(1).kernels_used["decode_layers"]) == {"persistent"}


if __name__ == "__main__":
    main()
