"""The loop of products as PTX, run in Python: what it multiplies, what it waits for, and when it gives slots back."""

import types
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from persistent_threads import running
from ptx_machine import PtxMachine

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
    found = np.full((INPUT_TILES * TILE_K // 8, rows, 8), np.nan, ml_dtypes.bfloat16)
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


def started(batch: int, rows: int, begin: int, count: int, tile: int, part: int, row: int) -> list[int]:
    """What the kernel finds out about an item before its input is there."""
    phase = mock.Mock(spec=Phase, padded_rows=PADDED_ROWS)
    plan: Any = types.SimpleNamespace(batch=batch, input_rows=rows, steps=[phase], offset=lambda kind, step: OFFSET)
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
    memory = np.full(INPUT + INPUT_TILES * TILE_K * 2 * rows + 256, 0xFF, np.uint8)  # no number anywhere
    given = input_bytes(x, rows)
    memory[INPUT : INPUT + len(given)] = given
    ring = Landing(memory, weights, first)
    start = started(batch, rows, begin, count, first, part=3, row=128)
    found = ring.machine.run(multiply_tiles(STAGES, rows), [*start[:5], BARRIERS + 8 * STAGES], 4)
    columns = slice(begin * TILE_K, (begin + count) * TILE_K)
    want = np.hstack([w.astype(np.float64) for w in weights]) @ x[:, columns].astype(np.float64).T
    np.testing.assert_allclose(found[:, :batch], want, rtol=1e-12, atol=1e-9)
    assert start[5] == 4 * (OFFSET + 3 * batch * PADDED_ROWS + 128)
    assert ring.given_back == [(first + i) % STAGES for i in range(count)]
