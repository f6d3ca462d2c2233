"""Compiles a step while the host is busy with others, so that a first call takes as long as the longest of them, not as all."""

import functools
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class BackgroundStep:
    """A jitted function that is called with arguments of one kind, and may be compiled in another thread before its first call.

    Args:
      jitted: what `jax.jit` gave.
    """

    def __init__(self, jitted: Any):
        self._jitted = jitted
        self._compiled: Future[Any] | None = None

    def begin(self, *shapes: Any) -> None:
        """Starts to compile it for arguments of such shapes, if nobody has. It is traced here, where the caller's settings are."""
        if self._compiled is None:
            self._compiled = _threads().submit(self.lower(*shapes).compile)

    def lower(self, *shapes: Any) -> Any:
        """It lowered, as `jax.jit` does."""
        return self._jitted.lower(*shapes)

    def __call__(self, *arguments: Any) -> Any:
        """Calls it once it is compiled.

        Raises:
          Exception: whatever compiling it raised.
        """
        self.begin(*arguments)
        assert self._compiled is not None
        return self._compiled.result()(*arguments)


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "compile")
