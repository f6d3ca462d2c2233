"""The persistent kernel with other sizes than were measured."""

import contextlib
import dataclasses
from collections.abc import Iterator
from unittest import mock

from pallas_kernels.persistent import layers, tuning


@contextlib.contextmanager
def tuned(**sizes: int) -> Iterator[None]:
    """Kernels that are traced meanwhile have these, and else those of the device."""
    with mock.patch.object(layers, "tuning_for", lambda *of: dataclasses.replace(tuning.tuning_for(*of), **sizes)):
        yield
