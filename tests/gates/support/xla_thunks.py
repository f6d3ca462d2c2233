"""What XLA runs for a program, in order: the list of thunks that `xla_dump_to` writes, read back as a tree.

    000: kWhile [source | sink]
    condition:
        001: kCustomKernel [source | sink] compare grid: [1, 1, 1] threads: [1, 1, 1]  shared_memory: 0 bytes
      body:
        002: kCommandBuffer [source | sink]
            003: kCopy [source | sink] copy

A label belongs to the last thunk that is less indented; XLA does not indent "condition:", which follows its loop directly. A part
without any thunk has "No thunks." in its place, and the next label on the same line.
"""

import dataclasses
import re
from collections.abc import Iterator

_THUNK = re.compile(r"(?P<indent> *)\d+: (?P<kind>k\w+) *\[[^]]*\] *(?P<rest>.*)")
_LABEL = re.compile(r"(?P<indent> *)(?P<name>\w+):$")
_KERNEL = re.compile(r"(\S+) +grid: \[([\d, ]+)\] +threads: \[([\d, ]+)\] +shared_memory: (\d+) bytes")

Dim3 = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A launch: blocks, threads of a block, and bytes of shared memory that a block asks for at launch."""

    name: str
    grid: Dim3
    threads: Dim3
    shared_memory: int


@dataclasses.dataclass
class Thunk:
    """A step. ``parts`` holds its inner steps by label: "body" and "condition" of a loop, "" of a command buffer."""

    kind: str
    kernel: Kernel | None = None
    parts: dict[str, list["Thunk"]] = dataclasses.field(default_factory=dict)

    def walk(self) -> Iterator["Thunk"]:
        """This thunk and all within it."""
        yield self
        for part in self.parts.values():
            for thunk in part:
                yield from thunk.walk()


def parse_thunks(text: str) -> list[Thunk]:
    """The top-level thunks of a ``*thunk_sequence*.txt``.

    Raises:
      ValueError: a line that is neither a thunk nor a label.
    """
    root = Thunk("program")
    open_thunks: list[tuple[int, Thunk]] = [(-1, root)]  # by indent, outermost first
    labels: dict[int, str] = {}  # of a thunk, by identity: the part that its next inner thunk belongs to
    for line in filter(str.strip, text.replace("No thunks.", "\n").splitlines()):
        if label := _LABEL.match(line.rstrip()):
            indent = len(label["indent"])
            while label["name"] != "condition" and open_thunks[-1][0] >= indent:
                open_thunks.pop()
            labels[id(open_thunks[-1][1])] = label["name"]
            continue
        match = _THUNK.match(line)
        if match is None:
            raise ValueError(f"neither a thunk nor a label: {line!r}")
        indent = len(match["indent"])
        while open_thunks[-1][0] >= indent:
            open_thunks.pop()
        parent = open_thunks[-1][1]
        thunk = Thunk(match["kind"], _kernel(match["rest"]))
        parent.parts.setdefault(labels.get(id(parent), ""), []).append(thunk)
        open_thunks.append((indent, thunk))
    return root.parts.get("", [])


def _kernel(text: str) -> Kernel | None:
    match = _KERNEL.match(text)
    if match is None:
        return None
    name, grid, threads, shared = match.groups()
    return Kernel(name, _dim3(grid), _dim3(threads), int(shared))


def _dim3(text: str) -> Dim3:
    x, y, z = map(int, text.split(","))
    return x, y, z
