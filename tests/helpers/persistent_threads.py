"""Code of a program's threads, as emitted for the persistent kernel, run by numpy: every value is an array, one number a thread.

`running` replaces what `code` and `words` emit by the arithmetic itself, 32 bits wide. Words are those that a `Machine` has left;
what a thread would write has to be what is there.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np
from persistent_machine import ACTIVATIONS, Machine

from pallas_kernels.persistent import attended, code, columns, gates, inputs, launch, outputs, stream, words
from pallas_kernels.persistent.launch import Emitter, Launch
from pallas_kernels.persistent.steps import THREADS

WORDS, OPERANDS, ADDRESSES, NUMBERS = (1 << shift for shift in (44, 50, 51, 52))
"""Addresses, far apart; an operand has 32 bits of its own."""

MASK = (1 << 32) - 1
Array = Any


class Threads:
    """Of one program, in a machine that has ended."""

    def __init__(self, machine: Machine, program: int, lanes: int = THREADS):
        self.machine, self.program, self.lanes = machine, program, lanes
        self.table = machine.plan.numbers.table()
        self.active = [np.ones(self.lanes, bool)]
        self.activations = np.full((machine.plan.activation_tiles * 128, 8), np.nan)
        self.shared: dict[int, float] = {}
        self.published: set[int] = set()
        self.awaited: Array = 0

    def emitter(self, step: int, layer: int, eps: float) -> Emitter:
        shell = Launch(self.machine.plan, *[None] * 7, eps)  # pyright: ignore[reportArgumentType]
        return Emitter(shell, step, WORDS, ADDRESSES, NUMBERS, 0, 0, 0, layer & MASK, self.machine.epoch(layer))

    # ------------------------------------------------------------------ memory

    def load_pointer(self, base: int, index: Array) -> Array:
        assert base == ADDRESSES
        (one,) = set(np.ravel(index).tolist())
        return OPERANDS + (one << 32)

    def load_integer(self, base: int, offset: Array) -> Array:
        assert base == NUMBERS
        return self.table.ravel()[np.asarray(offset) // 4].astype(np.int64) & MASK

    def load_bf16(self, base: int, offset: Array) -> list[Array]:
        operand = self.machine.operands[(base - OPERANDS) >> 32].ravel()
        at = np.asarray(offset) // 2
        assert (np.asarray(offset) % 8 == 0).all()
        return [operand[at + i] for i in range(4)]

    def word(self, address: Array, count: int, there: Array) -> list[Array]:
        """Words that have to be of the epoch that is waited for where they are there."""
        at, there = (np.broadcast_to(a, self.lanes) for a in ((np.asarray(address) - WORDS) // 4, self.here(there)))
        assert (np.asarray(address) % (4 * count) == 0).all()
        found = []
        for i in range(count):
            here = np.where(there, at + i, 0)
            fresh = (self.machine.epochs[here] == self.awaited) | ~there
            assert fresh.all(), "words of another epoch are waited for"
            found.append(np.where(there, self.machine.words[here], 0.0))
        return found

    def store(self, address: Array, values: Sequence[Array], epoch: Array, condition: Array) -> None:
        assert (np.asarray(address) % (4 * len(values)) == 0).all()
        at, real = np.broadcast_to((np.asarray(address) - WORDS) // 4, self.lanes), self.here(condition)
        for i, value in enumerate(values):
            here = (at + i)[real]
            assert len(set(here.tolist())) == len(here) and not self.published & set(here.tolist()), "written twice"
            self.published |= set(here.tolist())
            assert (self.machine.epochs[here] == np.broadcast_to(epoch, self.lanes)[real]).all()
            np.testing.assert_allclose(
                np.broadcast_to(value, self.lanes)[real], self.machine.words[here], rtol=1e-6, atol=1e-9
            )

    def store_activations(self, base: int, offset: Array, values: Sequence[Array], condition: Array = True) -> None:
        k, row = np.broadcast_to(offset, self.lanes) // 8, np.broadcast_to(offset, self.lanes) % 8
        real = self.here(condition)
        for i, value in enumerate(values):
            self.activations[(k + i)[real], row[real]] = np.broadcast_to(value, self.lanes)[real]

    def store_shared(self, base: int, offset: Array, value: Array, condition: Array) -> None:
        real = self.here(condition)
        places, values = (np.broadcast_to(a, self.lanes)[real].tolist() for a in (offset, value))
        self.shared |= dict(zip(places, values, strict=True))

    def here(self, condition: Array) -> np.ndarray:
        return np.broadcast_to(np.logical_and(self.active[-1], condition), self.lanes)

    # ------------------------------------------------------------------ control

    @contextlib.contextmanager
    def when(self, condition: Array) -> Iterator[None]:
        self.active.append(self.here(condition))
        yield
        self.active.pop()

    def repeat(self, count: Array, carried: Sequence[Array], body: Any) -> list[Array]:
        (turns,) = set(np.ravel(count).tolist())
        found = list(carried)
        for turn in range(turns):
            found = list(body(turn, found))
        return found


@contextlib.contextmanager
def running(threads: Threads) -> Iterator[None]:
    """What is emitted meanwhile is computed."""
    lanes, base = np.arange(threads.lanes), lambda b, o: np.asarray(b) + np.asarray(o)
    wrap = lambda op: lambda a, b: op(np.asarray(a, np.int64), b) & MASK  # noqa: E731

    def load_run(b: Any, first: Any, need: Any, old: Any) -> list[Array]:
        width = 4 if len(old) % 4 == 0 else 1
        starts = range(0, len(old), width)
        return [v for i in starts for v in threads.word(base(b, 4 * (np.asarray(first) + i)), width, need)]

    def load_part(first: Any, part: int, step: Any, some: Any, old: Any) -> list[Array]:
        assert len(old) == 4
        return threads.word(first + part * np.asarray(step), 4, (np.asarray(some) >> part) & 1 == 1)

    def until_written(reads: Sequence[Any], patience: Any) -> list[list[Array]]:
        found = []
        for read in reads:
            threads.awaited = read.epoch
            words = read.load(True, read.words)
            assert len(words) == len(read.words)
            found.append(read.values(words))
        return found

    emitted = {
        "add": wrap(np.add), "sub": wrap(np.subtract), "mul": wrap(np.multiply), "quotient": wrap(np.floor_divide),
        "remainder": wrap(np.remainder), "either": wrap(np.bitwise_or), "smaller": wrap(np.minimum),
        "both": lambda a, b: np.bitwise_and(a, b),
        "add_f": np.add, "sub_f": np.subtract, "mul_f": np.multiply, "div_f": np.divide, "max_f": np.maximum,
        "select": np.where, "integer": lambda v: v & MASK, "number": float, "equal": lambda a, b: np.equal(a, b),
        "below": lambda a, b: np.less(a, b), "thread": lambda: lanes,
        "reader": lambda: lanes, "meet_readers": lambda count: None, "let_be_multiplied": lambda: None,
        "program": lambda: threads.program,
        "meet": lambda: None, "when": threads.when, "repeat": threads.repeat, "load_pointer": threads.load_pointer,
        "load_integer": threads.load_integer, "load_bf16": threads.load_bf16, "floats": list,
        "total": lambda values: sum(values), "offset_pointer": base, "input_offset": lambda k, row, rows: 8 * k + row,
        "store_activations": threads.store_activations, "store_shared": threads.store_shared,
        "load_shared": lambda b, offset: threads.shared.get(int(offset), np.nan), "inverse_root": lambda v: 1 / np.sqrt(v),
        "power_of_two": np.exp2, "reciprocal": lambda v: 1 / v, "positive": lambda v: v > 0,
        "warp_sum": lambda v: np.repeat(np.broadcast_to(v, threads.lanes).reshape(-1, 32).sum(1), 32),
    }  # fmt: skip
    loads = {
        "load_words": lambda b, o, need, old: threads.word(base(b, o), 4, need),
        "load_run": load_run, "load_part": load_part, "until_written": until_written,
        "store_word": lambda b, o, v, epoch, c: threads.store(base(b, o), [v], epoch, c),
        "store_words": lambda b, o, v, epoch, c: threads.store(base(b, o), v, epoch, c),
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(gates, "ACTIVATIONS", ACTIVATIONS))
        for name, value in emitted.items():
            stack.enter_context(mock.patch.object(code, name, value))
        for module in (words, columns, attended, inputs, launch, outputs, stream):
            for name, value in loads.items():
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, value))
        yield
