"""Processes of cases, of which some may start before their turn, so that only what needs the GPU waits for it.

Imports, tracing and weights drawn on the host need no GPU; what does, stands in the case's script inside `gpu_alone` or, where
nothing is timed, `gpu_beside_others`.
"""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any

from jobs import last_line

_LOCK = "FLASHSVD_BENCH_LOCK"


@contextlib.contextmanager
def gpu_alone() -> Iterator[None]:
    """In a case's process: waits until no other case uses the GPU; does nothing where none can."""
    with _held(fcntl.LOCK_EX):
        yield


@contextlib.contextmanager
def gpu_beside_others() -> Iterator[None]:
    """The same until none is alone on it: for what prepares a case, and only takes longer where others do so too."""
    with _held(fcntl.LOCK_SH):
        yield


@contextlib.contextmanager
def _held(kind: int) -> Iterator[None]:
    lock = os.environ.get(_LOCK)
    if lock is None:
        yield
        return
    with Path(lock).open("rb") as file:
        fcntl.flock(file, kind)  # until the file is closed, or the process ends
        yield


@contextlib.contextmanager
def taking_turns(together: int) -> Iterator[dict[str, str]]:
    """What the environment of cases needs, so many of which run at a time; JAX then takes memory as it goes, and not at once."""
    if together == 1:
        yield {}
        return
    with tempfile.NamedTemporaryFile() as lock:
        yield {_LOCK: lock.name, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def in_turn[Case, Process: contextlib.AbstractContextManager[Any]](
    todo: Iterable[Case], ahead: int, start: Callable[[int, Case, dict[str, str]], Process | None]
) -> Iterator[tuple[Case, Process]]:
    """What is to be done with its processes, in order, so many of which start before their turn.

    ``start(number, case, turns)`` starts one, with what `taking_turns` gives, or gives None where the case is left out.
    """
    waiting, running = deque(enumerate(todo, 1)), deque[tuple[Case, Process]]()
    with taking_turns(ahead + 1) as turns, contextlib.ExitStack() as started:
        while waiting or running:
            while waiting and len(running) <= ahead:
                number, case = waiting.popleft()
                process = start(number, case, turns)
                if process is not None:
                    running.append((case, started.enter_context(process)))
            if running:
                yield running.popleft()


class CaseProcess(contextlib.AbstractContextManager["CaseProcess"]):
    """A script that measures one case and prints a row; at the end of the context it ends with all that it started.

    Its output goes to files: a pipe would keep us waiting for processes that it has left behind.
    """

    def __init__(self, script: Path, case: str, env: Mapping[str, str]):
        self._files = contextlib.ExitStack()
        open_file = partial(tempfile.TemporaryFile, "w+")
        self._out, self._err = (self._files.enter_context(open_file()) for _ in range(2))
        # A session of its own, so that it can be ended with all that it started, such as compilers of PyTorch.
        self._process = subprocess.Popen(
            [sys.executable, str(script), case], stdin=subprocess.DEVNULL, stdout=self._out, stderr=self._err,
            env=dict(env), start_new_session=True,
        )  # fmt: skip

    def row(self, limit: float) -> dict[str, Any]:
        """The row that it prints within so many seconds from now; one with nothing but an `error` if it does not."""
        with self:
            try:
                self._process.wait(limit)
            except subprocess.TimeoutExpired:
                return {"error": f"no result after {limit:.0f} s"}
            rows = [line for line in _text(self._out).splitlines() if line.startswith("{")]
            if self._process.returncode or not rows:
                return {"error": last_line(_text(self._err))[:300]}
            return json.loads(rows[-1])

    def __exit__(self, *_: object) -> None:
        if self._out.closed:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._files.close()


def _text(file: IO[str]) -> str:
    file.seek(0)
    return file.read()
