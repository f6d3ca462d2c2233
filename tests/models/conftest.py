"""Mixed dtypes are errors here: an implicit promotion to float32 would hide in bfloat16 models as lost speed."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def strict_dtypes() -> Iterator[None]:
    with jax.numpy_dtype_promotion("strict"):
        yield
