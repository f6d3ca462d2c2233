"""A process whose time and memory are measured, and which is killed on a condition."""

import dataclasses
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_INTERVAL = 0.05
_FIELDS = {"VmHWM": "peak_rss_gib", "RssAnon": "peak_anonymous_gib"}


@dataclasses.dataclass
class Watched:
    """What became of it.

    Attributes:
      seconds: it ran.
      exit_code: as of `subprocess`, -9 where it was killed.
      peak_rss_gib: the most that it had in memory, files that it maps and the system could drop again included.
      peak_anonymous_gib: the most without those, as seen every twentieth of a second.
    """

    seconds: float = 0.0
    exit_code: int = 0
    peak_rss_gib: float = 0.0
    peak_anonymous_gib: float = 0.0

    @property
    def killed(self) -> bool:
        return self.exit_code == -signal.SIGKILL


def watch(command: Sequence[str], env: Mapping[str, str], until: Callable[[], bool]) -> Watched:
    """Runs a command to its end, or kills it (SIGKILL) as soon as ``until`` holds."""
    found, begin = Watched(), time.monotonic()
    with subprocess.Popen(command, env=dict(env)) as process:
        while process.poll() is None:
            _look(process.pid, found)
            if until():
                process.kill()
                process.wait()
                break
            time.sleep(_INTERVAL)
    found.seconds, found.exit_code = round(time.monotonic() - begin, 1), process.returncode
    return found


def _look(pid: int, found: Watched) -> None:
    """Takes in what the system says of the process; nothing where it has ended meanwhile, or the system is not Linux."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        name, _, value = line.partition(":")
        if name in _FIELDS:
            gib = round(int(value.split()[0]) / 2**20, 3)
            setattr(found, _FIELDS[name], max(getattr(found, _FIELDS[name]), gib))
