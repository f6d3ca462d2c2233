"""Host memory at its peak: one shard while writing, the model and little more while loading on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

SHARD_BYTES = 48 * 2**20
HF_CONFIG = {
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}

# VmHWM and not ru_maxrss, which a process inherits from the one that started it.
PRELUDE = """
import json, sys
import jax, numpy as np
from flashsvd_jax.checkpoint import FolderWriter, Manifest, load_params
from flashsvd_jax.config import ModelConfig
from flashsvd_jax.factorization import Factorization
from flashsvd_jax.schema import count_params, schema

def memory(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))

jax.device_put(0).block_until_ready()
dst, hf_config, shard_bytes = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
before = memory("VmRSS")
"""
WRITE = """
import os
os.fsync = lambda handle: None  # a busy disk may take long
config = ModelConfig.from_hf(hf_config)
params = count_params(config)
manifest = Manifest(family="dense", dtype="float16", factorization=Factorization(), params=params, params_dense=params)
with FolderWriter(dst, hf_config, manifest, shard_bytes=shard_bytes) as writer:
    for name, spec in schema(config).items():
        writer.add(name, np.full(spec.shape, len(name), np.float16))
"""
LOAD = """
params = load_params(dst)
"""
REPORT = """
print(memory("VmHWM") - before)
"""


def peak(script: str, folder: Path) -> int:
    """Bytes at the peak of a script that runs in a process of its own, above those after the imports."""
    command = [sys.executable, "-c", PRELUDE + script + REPORT, str(folder), json.dumps(HF_CONFIG), str(SHARD_BYTES)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_peaks(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    while_writing = peak(WRITE, folder)
    files = [path.stat().st_size for path in folder.glob("*.safetensors")]
    largest_array = 2 * HF_CONFIG["vocab_size"] * HF_CONFIG["hidden_size"]
    print(f"model {sum(files) / 2**20:.0f} MiB in {len(files)} files; writing {while_writing / 2**20:.0f} MiB")
    assert len(files) > 5
    assert while_writing < 1.35 * (SHARD_BYTES + largest_array)
    while_loading = peak(LOAD, folder)
    print(f"loading {while_loading / 2**20:.0f} MiB, {while_loading / sum(files):.2f} of the model")
    assert sum(files) < while_loading < 1.35 * sum(files)
