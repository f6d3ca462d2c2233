"""Processes of cases, of which some may start before their turn, so that only what needs the GPU waits for it.

Imports, tracing and weights drawn on the host need no GPU; what does, stands in the case's script inside `gpu_alone` or, where
nothing is timed, `gpu_beside_others`.
"""

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

_LOCK = "FLASHSVD_BENCH_LOCK"
_WAITS, _HAS = "# waits for the GPU", "# has the GPU"
_PATIENCE = 10
"""Limits of time that a case may wait for others, each of which may prepare itself meanwhile."""
_POLL_S = 0.02


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
        print(_WAITS, flush=True)
        fcntl.flock(file, kind)  # until the file is closed, or the process ends
        print(_HAS, flush=True)
        yield


@contextlib.contextmanager
def taking_turns(together: int) -> Iterator[dict[str, str]]:
    """What the environment of cases needs, so many of which run at a time; JAX then takes memory as it goes, and not at once."""
    if together == 1:
        yield {}
        return
    with tempfile.NamedTemporaryFile() as lock:
        yield {_LOCK: lock.name, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


@contextlib.contextmanager
def _ending_in_order() -> Iterator[None]:
    """A signal to end is an exception meanwhile, so that contexts are left."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def in_turn[Case, Process: contextlib.AbstractContextManager[Any]](
    todo: Iterable[Case], ahead: int, start: Callable[[int, Case, dict[str, str]], Process | None]
) -> Iterator[tuple[Case, Process]]:
    """What is to be done with its processes, in order, so many of which start before their turn.

    ``start(number, case, turns)`` starts one, with what `taking_turns` gives, or gives None where the case is left out. A signal to
    end, as `timeout` sends it, ends them too: what went on using the GPU would slow down what is timed next.
    """
    waiting, running = deque(enumerate(todo, 1)), deque[tuple[Case, Process]]()
    with _ending_in_order(), taking_turns(ahead + 1) as turns, contextlib.ExitStack() as started:
        while waiting or running:
            while waiting and len(running) <= ahead:
                number, case = waiting.popleft()
                process = start(number, case, turns)
                if process is not None:
                    running.append((case, started.enter_context(process)))
            if running:
                yield running.popleft()


class ScriptProcess(contextlib.AbstractContextManager["ScriptProcess"]):
    """A script that measures something and prints rows, a JSON object a line; at the end of the context it ends with all that it
    started.

    Its output goes to files: a pipe would keep us waiting for processes that it has left behind.

    Args:
      script: its file.
      argument: of its command line.
      env: its environment.

    Attributes:
      failure: once `rows` has ended, why there may be fewer than there should, "" if the script ended by itself and well.
    """

    failure = ""

    def __init__(self, script: Path, argument: str, env: Mapping[str, str]):
        self._files = contextlib.ExitStack()
        new_file = partial(tempfile.NamedTemporaryFile, "w+")
        out, self._err = (self._files.enter_context(new_file()) for _ in range(2))
        self._out = self._files.enter_context(Path(out.name).open())  # noqa: SIM115 (closed with the others)
        # A session of its own, so that it can be ended with all that it started, such as compilers of PyTorch.
        self._process = subprocess.Popen(
            [sys.executable, str(script), argument], stdin=subprocess.DEVNULL, stdout=out, stderr=self._err, env=dict(env),
            start_new_session=True,
        )  # fmt: skip

    def rows(self, limit: float) -> Iterator[dict[str, Any]]:
        """Its rows as they come; anything else that a library prints is dropped. A row that takes longer than ``limit`` seconds is
        the end; waiting for other cases does not count."""
        line, since, waits = "", time.monotonic(), False
        while True:
            ended = self._process.poll() is not None  # asked before, so that nothing it printed is missed
            while part := self._out.readline():
                line += part
                if line.endswith("\n"):
                    row, line = line, ""
                    if row.startswith("{"):
                        yield json.loads(row)
                        since = time.monotonic()
                    elif row.strip() in (_WAITS, _HAS):
                        since, waits = time.monotonic(), row.strip() == _WAITS
            if ended:
                break
            if time.monotonic() - since > limit * (_PATIENCE if waits else 1):
                self.failure = "others kept the GPU" if waits else f"no result after {limit:.0f} s"
                return
            time.sleep(_POLL_S)
        if self._process.returncode:
            self._err.seek(0)
            self.failure = f"exit status {self._process.returncode}: {last_line(self._err.read())}"[:300]

    def row(self, limit: float) -> dict[str, Any]:
        """The last of its rows, for each of which it has ``limit`` seconds, and its end; if it fails, an `error` alone."""
        with self:
            found = [*self.rows(limit)]
            if self.failure or not found:
                return {"error": self.failure or "no result"}
            return found[-1]

    def __exit__(self, *_: object) -> None:
        if self._out.closed:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._files.close()


def last_line(text: str) -> str:
    """What a process said last, which tells why it ended: the last error, if there is any, as advice may follow it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return (errors or lines or ["no message"])[-1]
