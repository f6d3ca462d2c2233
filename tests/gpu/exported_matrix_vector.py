"""The jax-triton kernel on a GPU whose machine lacks jax-triton: written elsewhere, as StableHLO with the PTX inside, run here.

    python tests/gpu/exported_matrix_vector.py write build/jax_triton    # needs jax-triton and JAX's CUDA plugin, no GPU
    python tests/gpu/exported_matrix_vector.py inspect build/jax_triton  # needs JAX
    python tests/gpu/exported_matrix_vector.py run build/jax_triton      # needs JAX on a GPU of compute capability 9.0

`run` compares with float64 numpy and ends with 1 where they differ. JAX promises no stability for custom calls: both sides need
the same version.
"""

import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh

CALL_TARGET = "triton_kernel_call_ffi"
# batch, n, k, dtype of the output: whole tiles, odd rows of weight, a short last step, fewer elements than a step.
CASES = [
    (1, 4096, 4096, "bfloat16"),
    (1, 1492, 11008, "float32"),
    (2, 409, 11008, "float32"),
    (3, 4097, 1032, "bfloat16"),
    (4, 1024, 4096, "float32"),
    (1, 33, 8, "float32"),
]
# Of the norm. Sums are in float32; a bfloat16 output is rounded to 8 bits.
TOLERANCE = {"bfloat16": 3e-3, "float32": 1e-5}


def write(folder: Path) -> None:
    """Exports the cases as files, each read back before it counts."""
    from pallas_kernels.jax_triton import matrix_vector

    folder.mkdir(parents=True, exist_ok=True)
    h200 = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    allow = [export.DisabledSafetyCheck.custom_call(CALL_TARGET)]
    for batch, n, k, dtype in CASES:
        f = jax.jit(partial(matrix_vector, dtype=jnp.dtype(dtype)))
        shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((batch, k), (n, k))]
        with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=h200)):
            data = export.export(f, platforms=["cuda"], disabled_checks=allow)(*shapes).serialize()
        (folder / f"matrix_vector_{batch}x{n}x{k}_{dtype}.stablehlo").write_bytes(data)
    inspect(folder)


def inspect(folder: Path) -> None:
    """Reads the files back and says what is in them."""
    for path, exported in _exported(folder):
        text = exported.mlir_module()
        if CALL_TARGET not in text:
            raise SystemExit(f"{path} calls no {CALL_TARGET}")
        signature = f"{[a.str_short() for a in exported.in_avals]} -> {exported.out_avals[0].str_short()}"
        print(f"{path.name}: {signature}, {path.stat().st_size} bytes, for {', '.join(exported.platforms)}")


def run(folder: Path) -> None:
    """Runs the files on the GPU and compares each with float64."""
    from jaxlib import gpu_triton  # noqa: F401  (registers the custom call)

    failed = False
    for path, exported in _exported(folder):
        random = np.random.default_rng(0)
        x, w = (random.standard_normal(a.shape).astype(ml_dtypes.bfloat16) for a in exported.in_avals)
        got = np.asarray(jax.jit(exported.call)(x, w), np.float64)
        want = x.astype(np.float64) @ w.astype(np.float64).T
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        good = bool(error <= TOLERANCE[exported.out_avals[0].dtype.name])
        failed |= not good
        print(f"{path.name}: relative error {error:.2e}{'' if good else '  TOO LARGE'}")
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}: {'FAILED' if failed else 'all agree'}")
    sys.exit(failed)


def _exported(folder: Path) -> list[tuple[Path, export.Exported]]:
    paths = sorted(folder.glob("*.stablehlo"))
    if not paths:
        raise SystemExit(f"no *.stablehlo in {folder}")
    return [(path, export.deserialize(bytearray(path.read_bytes()))) for path in paths]


if __name__ == "__main__":
    commands = {"write": write, "inspect": inspect, "run": run}
    if len(sys.argv) != 3 or sys.argv[1] not in commands:
        raise SystemExit(__doc__)
    commands[sys.argv[1]](Path(sys.argv[2]))
