"""The process that compiles for an H200: reads a request, writes memory figures as JSON and XLA's dump into a folder.

`python h200_child.py request.json answer.json`, with the wheels of `cuda_toolchain` on the import path.
"""

import json
import pickle
import sys
from pathlib import Path

import h200_target
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def main(request_file: str, answer_file: str) -> None:
    """Lowers and compiles what the request asks for."""
    request = json.loads(Path(request_file).read_text())
    h200_target.place_on(_described_h200())
    lower, args, kwargs = pickle.loads(bytes.fromhex(request["call"]))
    compiled = lower(*args, **kwargs).compile(_options(request["dump"], request["cuda"]))
    memory = compiled.memory_analysis()
    answer = {
        "temp_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
    }
    Path(answer_file).write_text(json.dumps(answer))


def _described_h200() -> NamedSharding:
    description = Path(__file__).with_name("h200.pbtxt").read_text()
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h200", target_config=description, topology="1x1x1"
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
