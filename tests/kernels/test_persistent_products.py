"""The loop of products as PTX, run in Python: what it multiplies, what it waits for, and when it gives slots back."""

import types
from typing import Any
from unittest import mock

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from persistent_ended import PROGRAMS, ended, found_items, last_phases
from persistent_machine import Machine
from persistent_models import EPS
from persistent_threads import WORDS, Threads, running
from ptx_machine import COLUMNS, ROWS, PtxMachine

from pallas_kernels.persistent import code
from pallas_kernels.persistent.outputs import store_words
from pallas_kernels.persistent.products import multiply_tiles, start_numbers
from pallas_kernels.persistent.ring import Ring
from pallas_kernels.persistent.steps import TILE_BYTES, TILE_K, TILE_ROWS, Phase

STAGES, INPUT_TILES, PADDED_ROWS, OFFSET = 5, 7, 192, 1000
SLOTS, INPUT, BARRIERS = 1024, 1024 + STAGES * TILE_BYTES, 1 << 17
"""Addresses in shared memory."""


def tile_bytes(tile: np.ndarray) -> np.ndarray:
    """As a bulk copy leaves a tile: halves of 64 columns, rows of 128 bytes whose chunks of 16 are swapped by row."""
    found = np.empty((2, TILE_ROWS, 8, 8), ml_dtypes.bfloat16)
    for row in range(TILE_ROWS):
        for chunk in range(8):
            halves = tile[row].reshape(2, 8, 8)
            found[:, row, chunk ^ row % 8] = halves[:, chunk]
    return found.reshape(-1).view(np.uint8)


def input_bytes(x: np.ndarray, rows: int) -> np.ndarray:
    """Eight columns of every row, then the next eight."""
    found = np.full((x.shape[1] // 8, rows, 8), np.nan, ml_dtypes.bfloat16)
    found[:, : len(x)] = x.reshape(len(x), -1, 8).swapaxes(0, 1)
    return found.reshape(-1).view(np.uint8)


class Landing:
    """Tiles land when somebody waits for them, into slots that have been given back."""

    def __init__(self, memory: np.ndarray, weights: list[np.ndarray], first: int):
        self.memory, self.weights, self.first, self.next = memory, weights, first, first
        self.given_back: list[int] = []
        self.machine = PtxMachine(memory, self.landed, self.arrive)

    def landed(self, barrier: int, parity: int) -> bool:
        slot, over = divmod(barrier - BARRIERS, 8)
        assert not over and slot == self.next % STAGES and parity == self.next // STAGES % 2, "another tile's barrier"
        if self.next - self.first - len(self.given_back) >= 2:
            raise AssertionError("more than one slot is kept")
        at = SLOTS + slot * TILE_BYTES
        self.memory[at : at + TILE_BYTES] = tile_bytes(self.weights[self.next - self.first])
        self.next += 1
        return True

    def arrive(self, barrier: int) -> None:
        slot = (barrier - BARRIERS - 8 * STAGES) // 8
        begin, end = (SLOTS + (slot + i) * TILE_BYTES for i in range(2))
        assert not any(begin <= at < end for group in self.machine.open_groups for at in group), "it may still be read"
        self.given_back.append(slot)
        self.memory[begin:end] = 0xFF  # no number


def multiplied(
    start: list[int], weights: list[np.ndarray], x: np.ndarray, rows: int, first: int
) -> tuple[np.ndarray, list[int]]:
    """Products [64, 8] of tiles, the first of which is that number in the ring, with an input; the slots that were given back."""
    given = input_bytes(x, rows)
    memory = np.full(INPUT + len(given) + 256, 0xFF, np.uint8)  # no number anywhere
    memory[INPUT : INPUT + len(given)] = given
    ring = Landing(memory, weights, first)
    found = ring.machine.run(multiply_tiles(STAGES, rows), [*start[:5], BARRIERS + 8 * STAGES], 4)
    return found, ring.given_back


def started(batch: int, rows: int, begin: int, count: int, tile: int, part: int, row: int) -> list[int]:
    """What the kernel finds out about an item before its input is there."""
    phase = mock.Mock(spec=Phase, padded_rows=PADDED_ROWS)
    plan: Any = types.SimpleNamespace(
        batch=batch, input_rows=rows, phase=lambda step: phase, offset=lambda kind, step: OFFSET
    )
    ring = Ring(types.SimpleNamespace(shape=(STAGES,)), None, None, 3)
    with running(mock.MagicMock(lanes=1)):
        found = start_numbers(plan, 0, ring, SLOTS, BARRIERS, INPUT, begin, count, tile, part, row)
    return [int(number) for number in found]


@pytest.mark.parametrize(("batch", "rows"), [(1, 1), (2, 2), (3, 4), (4, 4), (7, 8)])
@pytest.mark.parametrize(("first", "begin", "count"), [(0, 0, 1), (4, 2, 3), (13, 0, 7), (9, 6, 1)])
def test_products_of_tiles_and_input(batch: int, rows: int, first: int, begin: int, count: int) -> None:
    random = np.random.default_rng(first + count)
    x = random.standard_normal((batch, INPUT_TILES * TILE_K)).astype(ml_dtypes.bfloat16)
    weights = [random.standard_normal((TILE_ROWS, TILE_K)).astype(ml_dtypes.bfloat16) for _ in range(count)]
    start = started(batch, rows, begin, count, first, part=3, row=128)
    found, given_back = multiplied(start, weights, x, rows, first)
    columns = slice(begin * TILE_K, (begin + count) * TILE_K)
    want = np.hstack([w.astype(np.float64) for w in weights]) @ x[:, columns].astype(np.float64).T
    np.testing.assert_allclose(found[:, :batch], want, rtol=1e-12, atol=1e-9)
    assert start[5] == 4 * (OFFSET + 3 * batch * PADDED_ROWS + 128)
    assert given_back == [(first + i) % STAGES for i in range(count)]


class Stored(Threads):
    """Keeps what is stored, by address."""

    def __init__(self, machine: Machine, program: int):
        super().__init__(machine, program)
        self.stored: dict[int, float] = {}

    def store(self, address: Any, values: Any, epoch: Any, condition: Any) -> None:
        assert epoch == self.epoch
        (value,), real = values, self.here(condition)
        self.stored |= dict(zip(address[real].tolist(), value[real].tolist(), strict=True))


class Products:
    """[64, 8] as the threads have them."""

    def __init__(self, values: np.ndarray):
        self.values = values

    def foreach(self, one: Any) -> None:
        for i in range(4):
            row, column = ROWS + 8 * (i // 2), COLUMNS + i % 2
            one(self.values[row, column], (row, column))


@pytest.mark.parametrize(
    "name", ["dense among low rank", "split latents", "norms and biases of dense ones", "one layer"]
)
def test_what_a_program_stores_is_what_the_protocol_has(name: str) -> None:
    """From the input on, item by item: where it begins, products, and where they go."""
    machine, stored = ended(name), 0
    plan = machine.plan
    ring = Ring(types.SimpleNamespace(shape=(STAGES,)), None, None, 3)
    for layer, number in last_phases(plan):
        phase = plan.steps[number]
        assert isinstance(phase, Phase)
        for program in range(0, PROGRAMS, 3):
            found = found_items(plan, number, layer, program)
            for i in range(int(found.count)):
                item, team, split = found.item(jnp.int32(i)), int(found.team.number), int(found.split)
                rows, count, begin = found.rows(item.row_tile), int(item.count), int(item.begin)
                x = machine.held[layer, number, team, split]
                weights = tiles_of(
                    machine.operand(layer, int(rows.weight)), int(rows.row),
                    (split * int(found.team.k_tiles) + begin) * TILE_K, count,
                )  # fmt: skip
                threads, tile = Stored(machine, program), 7 * program + i
                threads.epoch = machine.epoch(layer)
                with running(threads), mock.patch.object(code, "as_index", lambda index: index):
                    start = start_numbers(
                        plan, number, ring, SLOTS, BARRIERS, INPUT, begin, count, tile,
                        split * phase.pieces + int(item.piece), int(rows.output),
                    )  # fmt: skip
                    products, _ = multiplied([int(n) for n in start], weights, x, plan.input_rows, tile)
                    shell: Any = types.SimpleNamespace(launch=types.SimpleNamespace(plan=plan), step=number)
                    e = threads.emitter(number, layer, EPS)
                    shell.emit = lambda body, scalars, arrays, e=e: body(e, scalars, [], arrays)
                    store_words(shell, Products(products), start[5])
                assert len(threads.stored) == TILE_ROWS * plan.batch
                places = (np.array(list(threads.stored)) - WORDS) // 4
                assert (machine.epochs[places] == threads.epoch).all()
                got, want = np.array(list(threads.stored.values())), machine.words[places]
                # Weights and input are rounded to bfloat16 here.
                assert np.linalg.norm(got - want) <= 0.01 * np.linalg.norm(want)
                stored += len(places)
    assert stored


def tiles_of(matrix: np.ndarray, row: int, column: int, count: int) -> list[np.ndarray]:
    """As bulk copies find them: what lies beyond the matrix is zeros."""
    padded = np.pad(matrix, ((0, TILE_ROWS), (0, TILE_K)))[row : row + TILE_ROWS]
    found = [padded[:, begin : begin + TILE_K] for begin in range(column, column + count * TILE_K, TILE_K)]
    return [np.pad(tile, ((0, 0), (0, TILE_K - tile.shape[1]))).astype(ml_dtypes.bfloat16) for tile in found]
