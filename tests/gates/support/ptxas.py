"""Registers, spills and stack of kernels, from assembling their PTX."""

import dataclasses
import re
import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ARCHITECTURE = "sm_90a"
_ENTRY = re.compile(r"^\s*\.visible \.entry (\w+)\(", re.MULTILINE)
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")


@dataclasses.dataclass(frozen=True)
class Resources:
    """What one thread of a kernel takes: registers, and bytes of stack and of spilled registers; and what ptxas warned of."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    warnings: tuple[str, ...] = ()


def entry_name(ptx: str) -> str | None:
    """The kernel in a file of XLA's dump, which holds one or, for constants alone, none."""
    names = _ENTRY.findall(ptx)
    if len(names) > 1:
        raise ValueError(f"more than one kernel in a PTX file: {', '.join(names)}")
    return names[0] if names else None


def measure(ptxas: Path, sources: Mapping[str, str]) -> dict[str, Resources]:
    """Assembles the PTX of every kernel, by name.

    Raises:
      RuntimeError: ptxas refuses one.
    """
    with ThreadPoolExecutor() as pool:
        return dict(zip(sources, pool.map(lambda ptx: _assemble(ptxas, ptx), sources.values()), strict=True))


def _assemble(ptxas: Path, ptx: str) -> Resources:
    command = [str(ptxas), "-arch", ARCHITECTURE, "-v", "-", "-o", "/dev/null"]
    run = subprocess.run(command, input=ptx, capture_output=True, text=True, check=False)
    frame, registers = _FRAME.search(run.stderr), _REGISTERS.search(run.stderr)
    if run.returncode or frame is None or registers is None:
        raise RuntimeError(f"ptxas {entry_name(ptx)}: {run.stderr.strip()}")
    warnings = tuple(
        line.strip() for line in run.stderr.splitlines() if "Performance Loss" in line or "warning" in line
    )
    return Resources(int(registers[1]), *map(int, frame.groups()), warnings)
