"""Lowers for CUDA and compiles for an H200, or another GPU, on a machine that has neither GPU nor driver.

Lowering happens in this process. Compilation happens in another one: it needs JAX's CUDA plugin, which the tests' own JAX must
not have, and some kernels end the process that compiles them. What is compiled travels there by pickle, so functions must be
those of an importable module (of the packages, tests/helpers or tests/gates/support), not lambdas or inner functions.
"""

import dataclasses
import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import described_device
import jax
import ptxas
from cuda_toolchain import Toolchain, require_toolchain
from xla_thunks import Kernel, Thunk, parse_thunks

from pallas_kernels.target import H200, Target

_CHILD = Path(described_device.__file__).with_name("compiler_child.py")
_TIMEOUT_S = 300


class CompilationError(Exception):
    """The other process failed; the message is the end of what it said."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program compiled for a GPU.

    Attributes:
      thunks: what the host does, in order, after command buffers are formed.
      ptx: PTX by kernel name. XLA compiles equal kernels once, so a launch may have the name of none of them.
      resources: registers and spills, by kernel name.
      temp_bytes: memory for intermediate values.
      argument_bytes, alias_bytes: memory of the arguments, and how much of it the outputs take over.
    """

    thunks: list[Thunk]
    ptx: Mapping[str, str]
    resources: Mapping[str, ptxas.Resources]
    temp_bytes: int
    argument_bytes: int
    alias_bytes: int

    def walk(self) -> list[Thunk]:
        """Every thunk, those inside loops and command buffers included."""
        return [inner for thunk in self.thunks for inner in thunk.walk()]

    @property
    def kernels(self) -> list[Kernel]:
        """Every launch, in order."""
        return [thunk.kernel for thunk in self.walk() if thunk.kernel is not None]

    def loop_body(self) -> list[Thunk]:
        """What is done in one turn of the program's only loop that lies in no other, be it part of a command buffer or not."""
        return self._loop().parts["body"]

    def loop_condition(self) -> list[Thunk]:
        """What is done before each turn of that loop, to find out whether there is to be one."""
        return self._loop().parts.get("condition", [])

    def _loop(self) -> Thunk:
        inside = [inner for thunk in self.thunks for inner in (thunk, *thunk.parts.get("", []))]
        (loop,) = (thunk for thunk in inside if thunk.kind == "kWhile")
        return loop


def lower_for_cuda(f: Callable[..., Any], *avals: Any, **jit_options: Any) -> Any:
    """``jax.jit(f, **jit_options)`` lowered for CUDA as on an H200, kernels included; avals are shapes or static arguments."""
    with described_device.as_on_device():
        traced = jax.jit(f, **jit_options).trace(*described_device.on_device(avals))
        return traced.lower(lowering_platforms=("cuda",))


def compile_for_h200(f: Callable[..., Any], *avals: Any, **jit_options: Any) -> Compiled:
    """The same, compiled down to machine code for an H200.

    Raises:
      CompilationError: it does not lower or compile.
    """
    return compile_lowered_by(lower_for_cuda, f, *avals, **jit_options)


def compile_lowered_by(lower: Callable[..., Any], *args: Any, **kwargs: Any) -> Compiled:
    """Compiles what ``lower(*args, **kwargs)`` returns for an H200, where lowering is not a plain `jax.jit` of a function."""
    return compile_for(H200, lower, *args, **kwargs)


def compile_for(device: Target, lower: Callable[..., Any], *args: Any, **kwargs: Any) -> Compiled:
    """The same for any GPU whose name JAX knows."""
    toolchain = require_toolchain()
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        request = {
            "call": _pickled(device, lower, args, kwargs),
            "cuda": str(toolchain.cuda),
            "dump": str(folder / "dump"),
        }
        answer = _run_child(toolchain, request, folder)
        return _read(toolchain, folder / "dump", answer)


def _pickled(device: Target, lower: Callable[..., Any], args: Any, kwargs: Any) -> str:
    try:
        return pickle.dumps((device, lower, args, kwargs)).hex()
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(f"only functions of importable modules can be compiled in another process: {error}") from error


def _run_child(toolchain: Toolchain, request: dict[str, str], folder: Path) -> dict[str, int]:
    question, answer = folder / "request.json", folder / "answer.json"
    question.write_text(json.dumps(request))
    # Flags of the caller could change what is compiled; and an XLA flag that the plugin does not know ends the process.
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    environment |= {
        "PYTHONPATH": os.pathsep.join([*toolchain.path, *filter(None, sys.path)]),
        "JAX_PLATFORMS": "cpu",
        # The kernels of these two are assembled before XLA sees them.
        "JAX_TRITON_DUMP_DIR": str(folder / "dump" / "jax_triton"),
        "MOSAIC_GPU_DUMP_TO": str(folder / "dump" / "mosaic_gpu"),
    }
    (folder / "dump" / "mosaic_gpu").mkdir(parents=True)
    command = [sys.executable, str(_CHILD), str(question), str(answer)]
    run = subprocess.run(
        command, env=environment, capture_output=True, text=True, errors="replace", check=False, timeout=_TIMEOUT_S
    )
    if run.returncode or not answer.exists():
        raise CompilationError(f"the compiler's process ended with {run.returncode}:\n{run.stderr[-4000:]}")
    return json.loads(answer.read_text())


def _read(toolchain: Toolchain, dump: Path, memory: dict[str, int]) -> Compiled:
    """The second list is only written where a command buffer was formed."""
    lists = [*dump.glob("*.thunk_sequence_after_thunk_passes.txt"), *dump.glob("*.thunk_sequence.txt")]
    if not lists:
        raise CompilationError("XLA wrote no list of thunks")
    ptx: dict[str, str] = {}
    for text in (path.read_text() for path in sorted(dump.rglob("*.ptx"))):
        name = ptxas.entry_name(text)
        if name is not None:
            ptx[name if name not in ptx else f"{name}#{len(ptx)}"] = text
    return Compiled(parse_thunks(lists[0].read_text()), ptx, ptxas.measure(toolchain.ptxas, ptx), **memory)
