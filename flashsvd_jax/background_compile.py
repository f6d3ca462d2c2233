"""Compiles steps while the host is busy with others, so that a first call takes as long as the longest of them, not as all."""

import functools
from collections.abc import Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

_THREADS = 4


class BackgroundStep:
    """A jitted function that is called with arguments of one kind, and may be compiled in another thread before its first call.

    Args:
      jitted: what `jax.jit` gave.
    """

    def __init__(self, jitted: Any):
        self._jitted = jitted
        self._compiled: Future[Any] | None = None
        self._gives: Any = None

    def begin(self, *shapes: Any) -> Any:
        """Starts to compile it for arguments of such shapes, if nobody has. It is traced here, where the caller's settings are.

        Returns:
          The shapes of what it gives.
        """
        if self._compiled is None:
            traced = self._jitted.trace(*shapes)
            self._gives, self._compiled = traced.out_info, _threads().submit(traced.lower().compile)
        return self._gives

    def wait(self) -> None:
        """Until it is compiled, if that has begun. Raises whatever compiling it raised; what begins it next tries again."""
        if self._compiled is None:
            return
        try:
            self._compiled.result()
        except Exception:
            self._compiled = None
            raise

    def shapes(self, *shapes: Any) -> Any:
        """The shapes of what it gives; nothing is compiled."""
        return self._jitted.eval_shape(*shapes)

    def lower(self, *shapes: Any) -> Any:
        """It lowered, as `jax.jit` does."""
        return self._jitted.lower(*shapes)

    def __call__(self, *arguments: Any) -> Any:
        """Calls it once it is compiled.

        Raises:
          Exception: whatever compiling it raised.
        """
        self.begin(*arguments)
        self.wait()
        assert self._compiled is not None
        return self._compiled.result()(*arguments)


class BackgroundSteps(dict[Hashable, BackgroundStep]):
    """Of one jitted function, for each kind of its arguments one, made when it is asked for by the caller's name of that kind."""

    def __init__(self, jitted: Any):
        super().__init__()
        self._jitted = jitted

    def __missing__(self, kind: Hashable) -> BackgroundStep:
        step = self[kind] = BackgroundStep(self._jitted)
        return step


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS, "compile")
