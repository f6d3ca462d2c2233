"""Lets several processes share the tests of this folder: see `in_parallel`."""

import os

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keeps the i-th of every n tests where FLASHSVD_SHARD is "i/n"."""
    index, count = map(int, os.environ.get("FLASHSVD_SHARD", "0/1").split("/"))
    items[:] = items[index::count]
