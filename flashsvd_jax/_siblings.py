"""Import of the packages installed beside this one: their names are so general that a user's folder may hide them."""

import importlib
from types import ModuleType

from flashsvd_jax.errors import FlashSVDError


def load(name: str) -> ModuleType:
    """Imports this project's own package ``name``.

    Raises:
      FlashSVDError: Python found another package of that name first, as it does for a folder in the current directory.
    """
    module = importlib.import_module(name)
    if not getattr(module, "__flashsvd__", False):
        found = module.__file__ or next(iter(module.__path__))
        raise FlashSVDError(
            f"{name!r} is {found}, which hides FlashSVD-JAX's own package of that name: "
            "rename it, or run from another directory"
        )
    return module
