"""Registers, spills, stack and code of kernels, from assembling their PTX."""

import dataclasses
import re
import struct
import subprocess
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_ENTRY = re.compile(r"^\s*\.visible \.entry (\w+)\(", re.MULTILINE)
_TARGET = re.compile(r"^\.target (\w+)", re.MULTILINE)
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")


@dataclasses.dataclass(frozen=True)
class Resources:
    """What one thread of a kernel takes: registers, and bytes of stack and of spilled registers; bytes of machine code of them
    all; and what ptxas warned of."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    code_bytes: int = 0
    warnings: tuple[str, ...] = ()


def entry_name(ptx: str) -> str | None:
    """The kernel in a file of XLA's dump, which holds one or, for constants alone, none."""
    names = _ENTRY.findall(ptx)
    if len(names) > 1:
        raise ValueError(f"more than one kernel in a PTX file: {', '.join(names)}")
    return names[0] if names else None


def architecture(ptx: str) -> str:
    """That PTX is written for, such as sm_90a."""
    (found,) = _TARGET.findall(ptx)
    return found


def measure(ptxas: Path, sources: Mapping[str, str]) -> dict[str, Resources]:
    """Assembles the PTX of every kernel, by name.

    Raises:
      RuntimeError: ptxas refuses one.
    """
    with ThreadPoolExecutor() as pool:
        return dict(zip(sources, pool.map(lambda ptx: _assemble(ptxas, ptx), sources.values()), strict=True))


def _assemble(ptxas: Path, ptx: str) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as out:
        command = [str(ptxas), "-arch", architecture(ptx), "-v", "-", "-o", out.name]
        run = subprocess.run(command, input=ptx, capture_output=True, text=True, check=False)
        assembled = out.read()
    frame, registers = _FRAME.search(run.stderr), _REGISTERS.search(run.stderr)
    if run.returncode or frame is None or registers is None:
        raise RuntimeError(f"ptxas {entry_name(ptx)}: {run.stderr.strip()}")
    warnings = tuple(
        line.strip() for line in run.stderr.splitlines() if "Performance Loss" in line or "warning" in line
    )
    return Resources(int(registers[1]), *map(int, frame.groups()), _code_bytes(assembled), warnings)


def _code_bytes(elf: bytes) -> int:
    """Of the sections of an ELF file that are executed."""
    (headers,), (size, count) = struct.unpack_from("<Q", elf, 0x28), struct.unpack_from("<HH", elf, 0x3A)
    sections = (struct.unpack_from("<IIQQQQ", elf, headers + size * i) for i in range(count))
    executed = 4  # SHF_EXECINSTR
    return sum(length for _, _, flags, _, _, length in sections if flags & executed)
