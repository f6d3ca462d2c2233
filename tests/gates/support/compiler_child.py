"""The process that compiles for a GPU: reads a request, writes memory figures as JSON and XLA's dump into a folder.

`python compiler_child.py request.json answer.json`, with the wheels of `cuda_toolchain` on the import path.
"""

import json
import pickle
import re
import sys
from pathlib import Path

import described_device
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.target import H200, Target


def main(request_file: str, answer_file: str) -> None:
    """Lowers and compiles what the request asks for."""
    request = json.loads(Path(request_file).read_text())
    device, lower, args, kwargs = pickle.loads(bytes.fromhex(request["call"]))
    described_device.compile_for(device, _described(device))
    compiled = lower(*args, **kwargs).compile(_options(request["dump"], request["cuda"]))
    memory = compiled.memory_analysis()
    answer = {
        "temp_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
    }
    Path(answer_file).write_text(json.dumps(answer))


def _described(device: Target) -> NamedSharding:
    """As XLA describes an H200, with what decides about kernels put in its place."""
    text, (major, minor) = Path(__file__).with_name("h200.pbtxt").read_text(), device.capability
    own = {
        "cuda_compute_capability": f"{{ major: {major} minor: {minor} }}",
        "core_count": f": {device.cores}",
        "shared_memory_per_block_optin": f": {device.shared_memory}",
        "shared_memory_per_core": f": {device.shared_memory + 1024}",
    }
    for field, value in own.items():
        text, count = re.subn(rf"^  {field}\b.*$", f"  {field}{value}", text, flags=re.MULTILINE)
        assert count == 1, field
    text = text.replace(H200.kind, device.kind)
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="described", target_config=text, topology="1x1x1"
    )
    return NamedSharding(Mesh(np.array(topology.devices), ("device",)), PartitionSpec())


def _options(dump: str, cuda: str) -> dict[str, str | int]:
    return {
        "xla_dump_to": dump,
        "xla_dump_emitter_re": "ptx",  # a wider pattern writes gigabytes
        "xla_gpu_cuda_data_dir": cuda,
        "xla_gpu_autotune_level": 0,  # nothing can be timed here; XLA's own products take default tiles
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
