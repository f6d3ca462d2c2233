"""Runs PTX of the persistent kernel's products in Python: one warpgroup whose threads take the same way, and its tensor cores.

It knows the few instructions that occur there, matrix descriptors as the PTX manual has them (section "Matrix Descriptor Format"),
and barriers as a list of what has happened. Registers are integers, or floats of all 128 threads.
"""

import operator
import re
from collections.abc import Callable, Sequence

import ml_dtypes
import numpy as np

_BINARY = {
    "add.u32": operator.add, "sub.u32": operator.sub, "xor.b32": operator.xor, "or.b32": operator.or_,
    "shr.u32": operator.rshift,
}  # fmt: skip
_COMPARE = {"eq": operator.eq, "ne": operator.ne}
_STATEMENT = re.compile(r"(?:(?P<label>\w+):\s*)?(?:@(?P<not>!?)(?P<if>\w+)\s+)?(?P<name>[\w.:]+)\s*(?P<rest>.*)", re.S)

ROWS = 16 * (np.arange(128) // 32) + np.arange(128) % 32 // 4
COLUMNS = 2 * (np.arange(128) % 4)
"""Of the first of four floats of each thread in products [64, 8]; the second is beside it, the others eight rows below."""


class PtxMachine:
    """Registers, shared memory, and two functions: ``landed(barrier, parity)`` and ``arrive(barrier)``.

    ``open_groups`` are addresses that instructions may still read, group by group; the last is the one that is not committed.
    """

    def __init__(self, memory: np.ndarray, landed: Callable[[int, int], bool], arrive: Callable[[int], None]):
        self.memory, self.landed, self.arrive = memory, landed, arrive
        self.registers: dict[str, object] = {}
        self.open_groups: list[set[int]] = [set()]

    def run(self, code: str, arguments: Sequence[int], results: int) -> np.ndarray:
        """Results [64, 8], of ``results`` floats a thread, which the code calls $0 and on; the arguments follow."""
        self.registers = {f"${results + i}": value for i, value in enumerate(arguments)}
        body = code.strip().removeprefix("{").removesuffix("}").strip()
        statements = [
            _STATEMENT.fullmatch(s.strip()) for s in body.split(";") if s.strip() and not s.strip().startswith(".reg")
        ]
        labels = {s["label"]: i for i, s in enumerate(statements) if s and s["label"]}
        at, turns = 0, 0
        while at < len(statements):
            statement, turns = statements[at], turns + 1
            assert statement is not None and turns < 100_000, "no end, or nothing that PTX knows"
            if statement["if"] and bool(self.registers[statement["if"]]) == bool(statement["not"]):
                at += 1
            elif statement["name"] == "bra":
                at = labels[statement["rest"]]
            else:
                self._do(statement["name"], statement["rest"])
                at += 1
        found = np.full((64, 8), np.nan)
        for i in range(results):
            found[ROWS + 8 * (i // 2), COLUMNS + i % 2] = self.registers[f"${i}"]
        return found

    def _value(self, text: str) -> object:
        text = text.strip()
        if text.startswith("0f"):
            return np.full(128, np.uint32(int(text[2:], 16)).view(np.float32))
        return int(text, 0) if re.fullmatch(r"\d\w*", text) else self.registers[text]

    def _do(self, name: str, rest: str) -> None:
        first, *others = (part.strip() for part in re.split(r",(?![^{\[]*[}\]])", rest)) if rest else ("",)
        if name in _BINARY:
            a, b = map(self._value, others)
            self.registers[first] = _BINARY[name](a, b) & 0xFFFFFFFF
        elif name.startswith("setp."):
            self.registers[first] = _COMPARE[name.split(".")[1]](*map(self._value, others))
        elif name.startswith("shfl.sync.idx"):
            assert others[1:] == ["0", "31", "-1"]  # the same in all threads, and so it stays
            self.registers[first] = self._value(others[0])
        elif name == "mov.b64":
            lower, upper = map(self._value, others[0].strip("{}").split(","))
            self.registers[first] = lower | upper << 32
        elif name.startswith("mov."):
            self.registers[first] = self._value(others[0])
        elif name == "add.f32":
            assert not any(self.open_groups), "sums are read before the tensor cores are done with them"
            self.registers[first] = self._value(others[0]) + self._value(others[1])
        elif name.startswith("mbarrier.try_wait.parity"):
            self.registers[first] = self.landed(self._address(others[0]), self._value(others[1]))
        elif name.startswith("mbarrier.arrive"):
            self.arrive(self._address(others[0]))
        elif name.startswith("wgmma.mma_async"):
            self._multiply([r.strip() for r in first.strip("{}").split(",")], *map(self._value, others[:2]))
        elif name.startswith("wgmma.wait_group"):
            self.open_groups = self.open_groups[-int(first) - 1 :]
        elif name.startswith("wgmma.commit_group"):
            self.open_groups.append(set())
        else:
            assert name == "wgmma.fence.sync.aligned", name

    def _address(self, text: str) -> int:
        base, _, offset = text.strip("[]").partition("+")
        return self._value(base) + int(offset or 0)

    def _multiply(self, sums: Sequence[str], a: int, b: int) -> None:
        self.open_groups[-1].add(16 * (a & 0x3FFF))
        products = self._matrix(a, 64) @ self._matrix(b, 8).T
        for i, name in enumerate(sums):
            self.registers[name] = self.registers[name] + products[ROWS + 8 * (i // 2), COLUMNS + i % 2]

    def _matrix(self, descriptor: int, rows: int) -> np.ndarray:
        """A matrix of 16 columns, each row's contiguous by eights at least."""
        start, leading, stride = (16 * (descriptor >> shift & 0x3FFF) for shift in (0, 16, 32))
        row, k = np.arange(rows)[:, None], np.arange(16)
        swizzle = descriptor >> 62
        assert swizzle in (0, 1)
        if swizzle:
            address = start + row // 8 * stride + row % 8 * 128 + 2 * k
            address ^= (address >> 7 & 7) << 4
        else:
            address = start + k // 8 * leading + row // 8 * stride + row % 8 * 16 + k % 8 * 2
        return self.memory.view(ml_dtypes.bfloat16)[address // 2].astype(np.float64)
