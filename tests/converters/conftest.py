"""Published checkpoints and their conversions, made once for all tests."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from published_checkpoints import Published, publish

from converters import ConversionReport, convert


@dataclass(frozen=True)
class Converted:
    """A checkpoint, the folder it was converted to in float32, and the report."""

    source: Published
    path: Path
    report: ConversionReport


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> Callable[[str], Published]:
    """Name of a case -> its checkpoint; nothing in it may be changed."""
    return cache(lambda case: publish(case, tmp_path_factory.mktemp(case)))


@pytest.fixture(scope="session")
def converted(tmp_path_factory, published) -> Callable[[str], Converted]:
    """Name of a case -> its conversion to float32; nothing in it may be changed."""

    @cache
    def make(case: str) -> Converted:
        source = published(case)
        path = tmp_path_factory.mktemp("converted") / case
        return Converted(source, path, convert(source.path, path, base=source.base, dtype="float32", progress=False))

    return make
