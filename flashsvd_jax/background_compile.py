"""Compiles steps while the host is busy with others, so that a first call takes as long as the longest of them, not as all."""

import contextlib
import functools
import threading
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from flashsvd_jax import kept_steps
from flashsvd_jax.compile_cache import compiled_anew, count_read
from flashsvd_jax.kept_steps import KeptStep
from pallas_kernels import add_choices, prefer, record
from pallas_kernels.registry import Record

_THREADS = 4


def preferring(kernels: str) -> contextlib.AbstractContextManager[None]:
    """Within it kernels are chosen as a user asks for: "auto", or the name of implementations to be tried first."""
    return prefer(None if kernels == "auto" else kernels)


class BackgroundStep:
    """A jitted function that is called with arguments of one kind, and may be compiled in another thread before its first call.

    Threads may call it at once; the first begins it.

    Args:
      jitted: what `jax.jit` gave.
      made_of: as text, all that decides what it computes beside its arguments; executables are kept across processes by it, none
        if it is None.
      used: where the choices of kernels go that are made as it is traced, or were as an earlier process traced it.
    """

    def __init__(self, jitted: Any, made_of: str | None = None, used: Record | None = None):
        self._jitted, self._made_of = jitted, made_of
        self._used: Record = {} if used is None else used
        self._chosen: Record = {}  # for this step alone, whenever it was traced
        self._compiled: Future[Any] | None = None
        self._gives: Any = None
        self._read: tuple[Path, tuple[Any, ...]] | None = None  # from where, and for arguments of which shapes
        self._untried: Path | None = None  # from where, until it was called
        self._lock = threading.RLock()

    def begin(self, *shapes: Any) -> Any:
        """Starts to compile it for arguments of such shapes, if nobody has, or to read what an earlier process has kept.

        It is traced here, where the caller's settings are.

        Returns:
          The shapes of what it gives.
        """
        with self._lock:
            return self._gives if self._compiled is not None else self._begin(*shapes)

    def _begin(self, *shapes: Any) -> Any:
        file = None if self._made_of is None else kept_steps.file_of(self._made_of, shapes)
        kept = None if file is None else kept_steps.read(file)
        if file is not None and kept is not None:
            add_choices(self._used, kept.used)
            self._gives, self._read, self._untried = kept.gives, (file, shapes), file
            self._compiled = _threads().submit(_loaded, kept)
            return self._gives
        with self._recorded():
            traced = self._jitted.trace(*shapes)
        self._gives, self._read, self._untried = traced.out_info, None, None
        self._compiled = _threads().submit(_compiled, traced.lower(), file, self._gives, self._chosen)
        return self._gives

    def wait(self) -> None:
        """Until it is compiled, if that has begun. Raises whatever compiling it raised; what begins it next tries again."""
        compiled = self._compiled
        if compiled is None:
            return
        try:
            compiled.result()
        except Exception as error:
            with self._lock:
                if self._compiled in (compiled, None):  # else another thread has begun it again
                    self._compiled = None
                    if self._read is None:
                        raise
                    file, shapes = self._read
                    kept_steps.forget(file, error)
                    self.begin(*shapes)
            self.wait()
        self._read = None  # what it holds may be large

    def shapes(self, *shapes: Any) -> Any:
        """The shapes of what it gives; nothing is compiled."""
        with self._recorded():
            return self._jitted.eval_shape(*shapes)

    def lower(self, *shapes: Any) -> Any:
        """It lowered, as `jax.jit` does."""
        with self._recorded():
            return self._jitted.lower(*shapes)

    def __call__(self, *arguments: Any) -> Any:
        """Calls it once it is compiled.

        Raises:
          Exception: whatever compiling it raised.
        """
        self.begin(*arguments)
        self.wait()
        assert self._compiled is not None
        try:
            return self._compiled.result()(*arguments)
        except Exception as error:
            # What was read may be at fault; its arguments are gone, but the next process does without it.
            if self._untried is not None:
                kept_steps.forget(self._untried, error)
            raise
        finally:
            self._untried = None

    @contextlib.contextmanager
    def _recorded(self) -> Iterator[None]:
        with record(self._chosen), record(self._used):
            yield


class BackgroundSteps(dict[Hashable, BackgroundStep]):
    """Of one jitted function, for each kind of its arguments one, made when it is asked for by the caller's name of that kind.

    Args:
      of_each: as `BackgroundStep` takes.
    """

    def __init__(self, *of_each: Any):
        super().__init__()
        self._of_each = of_each

    @classmethod
    def of(
        cls, function: Callable[..., Any], *given: Any, kernels: str, used: Record, **options: Any
    ) -> "BackgroundSteps":
        """Of a function and its first arguments, with options of `jax.jit`; what they say as text must tell them from others.

        Args:
          function: what is compiled.
          given: its first arguments.
          kernels: "auto", or the name of implementations to be tried first.
          used: see `BackgroundStep`.
          options: of `jax.jit`.
        """

        @functools.wraps(function)
        def chosen(*args: Any) -> Any:
            with preferring(kernels):
                return function(*given, *args)

        said = f"{function.__module__}.{function.__qualname__} {given} {options} {kernels}"
        return cls(jax.jit(chosen, **options), said, used)

    def __missing__(self, kind: Hashable) -> BackgroundStep:
        return self.setdefault(kind, BackgroundStep(*self._of_each))  # two threads get the same one


def _compiled(lowered: Any, file: Path | None, gives: Any, used: Record) -> Any:
    compiled, is_new = compiled_anew(lowered)
    # What was read from a cache lacks its functions when it is written again on a CPU.
    if file is not None and (is_new or jax.default_backend() != "cpu"):  # a task of its own, as nobody waits for that
        _threads().submit(kept_steps.write, file, compiled, gives, used)
    return compiled


def _loaded(kept: KeptStep) -> Any:
    compiled = kept.load()
    count_read()
    return compiled


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS, "compile")
