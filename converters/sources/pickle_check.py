"""Checking the opcodes of a pickle before it is run: what torch.save never writes is refused."""

import pickletools
from typing import Any

from flashsvd_jax.errors import CheckpointError

MAX_OPCODES = 10_000_000
# hash() of a tuple recurses on the C stack without a limit, so a deep one used as a key would crash the interpreter.
_MAX_TUPLE_DEPTH = 1000

# All that Python 3 writes with protocols 2 to 5, but for out-of-band buffers, the registry of extension codes (EXT*),
# which hands out real objects, and LONG4, an integer of more than 255 bytes.
_CONTROL = frozenset({"PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK"})
_PUTS = frozenset({"BINPUT", "LONG_BINPUT", "MEMOIZE"})
_GETS = frozenset({"BINGET", "LONG_BINGET"})
_NUMBERS = frozenset({"NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"})
_STRINGS = frozenset({"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"})
_BYTES = frozenset({"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"})
_TUPLES = frozenset({"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"})
_CONTAINERS = frozenset({"EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "FROZENSET"})
_FILLING = frozenset({"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS"})
_OBJECTS = frozenset({"GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "NEWOBJ_EX", "BUILD", "BINPERSID"})
_ALLOWED = frozenset().union(
    _CONTROL, _PUTS, _GETS, _NUMBERS, _STRINGS, _BYTES, _TUPLES, _CONTAINERS, _FILLING, _OBJECTS
)


def _stack_effect(opcode: pickletools.OpcodeInfo) -> tuple[bool, int, bool]:
    """Whether the opcode pops down to the last mark, how many values it pops below that, whether it pushes one."""
    before = opcode.stack_before
    to_mark = pickletools.markobject in before
    return to_mark, before.index(pickletools.markobject) if to_mark else len(before), bool(opcode.stack_after)


_EFFECTS = {opcode.name: _stack_effect(opcode) for opcode in pickletools.opcodes if opcode.name in _ALLOWED}


def check_pickle(data: bytes) -> None:
    """Follow the program of a pickle with the tuple depth of each value in place of the values, and run nothing.

    Raises CheckpointError for opcodes, memo indices or sizes that no checkpoint has, and ValueError for a malformed
    or truncated program.
    """
    stack: list[int] = []
    marks: list[int] = []
    memo: list[int] = []
    argument: Any
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        name = opcode.name
        if name not in _ALLOWED:
            raise CheckpointError(f"the pickle uses opcode {name}, which torch.save never writes")
        if count >= MAX_OPCODES:
            raise CheckpointError(f"the pickle has more than {MAX_OPCODES} opcodes, more than a model ever needs")
        if name == "MARK":
            marks.append(len(stack))
        elif name in _PUTS:
            _put(memo, argument if name != "MEMOIZE" else len(memo), stack[-1])
        elif name in _GETS:
            stack.append(memo[argument])
        else:
            to_mark, pops, pushes = _EFFECTS[name]
            depth = _pop(stack, marks, to_mark, pops) + (name in _TUPLES)
            if depth > _MAX_TUPLE_DEPTH:
                raise CheckpointError(f"the pickle nests tuples more than {_MAX_TUPLE_DEPTH} deep")
            if pushes:
                stack.append(depth)


def _put(memo: list[int], index: int, depth: int) -> None:
    # Unpickling allocates the memo up to its highest index; every pickler numbers its entries without gaps.
    if index > len(memo):
        raise CheckpointError(f"the pickle's memo jumps to index {index}")
    memo[index : index + 1] = [depth]


def _pop(stack: list[int], marks: list[int], to_mark: bool, pops: int) -> int:
    """Drop the operands of an opcode and return the largest of their depths, 0 if there are none."""
    start = (marks.pop() if to_mark else len(stack)) - pops
    if start < (marks[-1] if marks else 0):
        raise CheckpointError("the pickle takes more values from its stack than it has put there")
    depth = max(stack[start:], default=0)
    del stack[start:]
    return depth
